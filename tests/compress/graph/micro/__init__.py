"""Tiny networks, each with one construct that has broken a pruning tool; the table `CASES` says what must happen to it."""

from tests.compress.graph.micro import layers, layouts, odd, sharing, weights  # noqa: F401
from tests.compress.graph.micro.base import CASES, Net, conv

__all__ = ["CASES", "Net", "conv"]
