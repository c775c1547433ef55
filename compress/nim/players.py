"""The players of the pruning game and the eight published line-ups.

A player has one fixed strategy: an order in which it would take the surviving weights of a heap (flat positions). Weights missing from the
order are never taken by it; a player whose order is exhausted passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compress.errors import UserError
from compress.registry import nearest

Ranking = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Player:
    """`rank(weights [n], alive positions [m], generator) -> positions in the order of removal`."""

    name: str
    rank: Ranking


def _random(weights: np.ndarray, alive: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(alive)


def _l1(weights: np.ndarray, alive: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return alive[np.argsort(np.abs(weights[alive]), kind="stable")]


def _positive(weights: np.ndarray, alive: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    found = alive[weights[alive] > 0]
    return found[np.argsort(weights[found], kind="stable")]


def _negative(weights: np.ndarray, alive: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    found = alive[weights[alive] < 0]
    return found[np.argsort(-weights[found], kind="stable")]


PLAYERS = {
    "RANDOM": Player("RANDOM", _random),
    "L1": Player("L1", _l1),
    "POSITIVE": Player("POSITIVE", _positive),
    "NEGATIVE": Player("NEGATIVE", _negative),
}

METHODS = {
    "RANDOM": ("RANDOM",),
    "L1": ("L1",),
    "POSITIVE": ("POSITIVE",),
    "NEGATIVE": ("NEGATIVE",),
    "MAGNITUDE": ("POSITIVE", "NEGATIVE"),
    "L1+RANDOM": ("L1", "RANDOM"),
    "MAGNITUDE+RANDOM": ("RANDOM", "POSITIVE", "NEGATIVE"),
    "MAGNITUDE+L1": ("L1", "POSITIVE", "NEGATIVE"),
}
ALIASES = {"1+RANDOM": "L1+RANDOM"}


def players_of(method: str, log: Callable[[str], None] = lambda line: None) -> list[Player]:
    """The players of a published method; `1+RANDOM`, as one published command spells it, is `L1+RANDOM` with a warning to `log`."""
    if method in ALIASES:
        log(f"Pruning method {method!r} is read as {ALIASES[method]!r}.")
        method = ALIASES[method]
    if method not in METHODS:
        raise UserError(f"Unknown pruning method {method!r}{nearest(method, list(METHODS))}; known: {', '.join(METHODS)}.")
    return [PLAYERS[name] for name in METHODS[method]]
