"""One global threshold over the row and column importances of all layers, with a cap per side. Tensors in, index tensors out.

Symbols: rows [o] and columns [c] of every layer form one pool of n scores; `pool_fraction` p in [0, 1) (the published "ratio") removes the
k = floor(p n) lowest. Kept is what lies strictly above the k-th lowest score. A side that would lose more than `cap` of its entries is
cut at its own k_side = floor(cap size) lowest instead. The largest entry of a side always stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import UserError


class Sides(NamedTuple):
    """Row (output) and column (input) entries of one layer: scores, or kept indices."""

    rows: Tensor
    columns: Tensor


def normalized(scores: dict[str, Sides]) -> dict[str, Sides]:
    """Each side of each layer divided by its own sum (zeros stay)."""
    return {name: Sides(*(side / side.sum() if side.sum() > 0 else side for side in sides)) for name, sides in scores.items()}


def ranked(scores: dict[str, Sides]) -> dict[str, Sides]:
    """Each entry's place in its own side, as a fraction of the side: one threshold over these removes the same fraction of every side.

    Each side is shifted by less than one place, so that sides of the same size never tie and a threshold removes one entry of theirs after another.
    """
    sides = [side for pair in scores.values() for side in pair]
    places = []
    for number, side in enumerate(sides):
        place = torch.empty(side.numel(), dtype=torch.float64)
        place[side.argsort(stable=True).cpu()] = torch.arange(side.numel(), dtype=torch.float64)
        places.append((place + (number + 0.5) / len(sides)) / max(1, side.numel()))
    pairs = iter(places)
    return {name: Sides(next(pairs), next(pairs)) for name in scores}


def pool(scores: dict[str, Sides]) -> Tensor:
    """All scores, ascending."""
    return torch.cat([side.flatten() for sides in scores.values() for side in sides]).sort().values


def threshold(values: Tensor, pool_fraction: float) -> float:
    """The score that an entry must exceed to be kept; values ascending. UserError unless 0 <= pool_fraction < 1."""
    if not 0 <= pool_fraction < 1:
        raise UserError(f"The pool fraction is the share of scores removed, in [0, 1), got {pool_fraction!r}.")
    count = int(pool_fraction * len(values) + 1e-9)
    return values[count - 1].item() if count else float("-inf")


def keep(scores: dict[str, Sides], limit: float, cap: float) -> dict[str, Sides]:
    """Kept indices, ascending, of every side: scores above `limit`, at most the fraction `cap` of a side removed, at least one kept."""
    if not 0 < cap <= 1:
        raise UserError(f"The cap is the largest fraction of a side that may be removed, in (0, 1], got {cap!r}.")
    return {name: Sides(*(_side(side, limit, cap) for side in sides)) for name, sides in scores.items()}


def _side(side: Tensor, limit: float, cap: float) -> Tensor:
    kept = side > limit
    allowed = int(cap * side.numel() + 1e-9)
    if side.numel() - int(kept.sum()) > allowed:
        # ties at the side's own threshold are broken by position, so that exactly the allowed number goes
        kept = torch.ones_like(kept)
        kept[side.argsort(stable=True)[:allowed]] = False
    if not kept.any():
        kept[side.argmax()] = True
    return kept.nonzero().flatten()
