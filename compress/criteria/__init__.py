"""Channel criteria: how much the network needs each removable channel (low score = remove first).

One file per criterion, found by its registered name: `CRITERIA["l1"].score(graph, model, batches, loss_fn, generator, **options)`
returns `{group name: float64 tensor [size]}`, on the CPU, for the groups of `graph` that may be pruned.
"""

from __future__ import annotations

from compress.criteria.base import Criterion
from compress.registry import Registry

CRITERIA: Registry[type[Criterion]] = Registry("criterion", "compress.criteria")

__all__ = ["CRITERIA", "Criterion"]
