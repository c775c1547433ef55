"""From scores to masks: exact counts, deterministic ties, nothing brought back.

Of `total` weights under masks, ceil(density * total) stay (counted globally, or in each tensor), with a tolerance for the rounding of
density * total itself. Among equal scores the earlier position is removed first. Weights that are already pruned take no part, which
ranks them below every score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import UserError
from compress.masks.patterns import UNSTRUCTURED, NofM, Pattern

POOLS = ("global", "local")


def keep_count(density: float, total: int) -> int:
    """Number of weights kept at this density: ceil(density * total), at least 1."""
    return min(total, max(1, math.ceil(density * total - 1e-6)))


def check_density(density: float) -> None:
    """`UserError` unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise UserError(f"A density is the fraction of weights kept, in (0, 1], got {density!r}.")


_SAMPLE = 65_536


def kth_lowest(values: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of `values` `[n]`, count in 1..n.

    In a large tensor it is sought between two values of an evenly spaced sample that should enclose it; where they do not, in all.
    """
    if values.device.type != "cpu":
        # kthvalue is refused on a GPU in deterministic mode, for its index; sorting gives the same value.
        return values.sort().values[count - 1]
    if len(values) > 16 * _SAMPLE:
        sample = values[:: len(values) // _SAMPLE].sort().values
        place, margin = count * len(sample) // len(values), 4 * int(len(sample) ** 0.5)
        low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
        below = int((values < low).sum())
        inside = values[(values >= low) & (values <= high)]
        if below < count <= below + len(inside):
            return inside.kthvalue(count - below).values
    return values.kthvalue(count).values


def lowest(values: Tensor, count: int) -> Tensor:
    """Boolean tensor that marks the `count` lowest of `values` `[n]`; among equals the earlier position."""
    marked = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if count <= 0:
        return marked
    if count >= len(values):
        return ~marked
    edge = kth_lowest(values, count)
    marked |= values < edge
    ties = (values == edge).nonzero().flatten()
    marked[ties[: count - int(marked.sum())]] = True
    return marked


def lowest_units(values: Tensor, sizes: Tensor | None, count: int) -> Tensor:
    """Marks the lowest units until at least `count` weights are gone, never all of them; `sizes` None: one weight each."""
    if sizes is None:
        return lowest(values, count)
    if count <= 0:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    order = values.argsort(stable=True)
    gone = sizes[order].cumsum(0)
    number = min(int((gone < count).sum()) + 1, len(values) - 1)
    marked = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    marked[order[:number]] = True
    return marked


def _check_reachable(values: Tensor, sizes: Tensor | None, count: int, total: int, where: str) -> None:
    free = values < torch.inf
    removable = int(free.sum() if sizes is None else sizes[free].sum())
    if count > removable:
        alive = len(values) if sizes is None else int(sizes.sum())
        raise UserError(
            f"This criterion protects weights and cannot reach the density asked for{where}: "
            f"the lowest it reaches is {(alive - removable) / total:.4f}."
        )


def select(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    density: float | None,
    *,
    pool: str = "global",
    pattern: Pattern = UNSTRUCTURED,
    allow_empty: bool = False,
) -> dict[str, Tensor]:
    """New masks, each a part of the old one.

    `density` is the fraction kept of all weights in `masks` (pruned ones counted); None removes everything that is not protected by +inf. A
    pool or tensor that is already sparser stays as it is. `pool`: `global` ranks all tensors together, `local` each for itself. With units
    larger than one weight the density is met from below.

    Raises `UserError` for a density outside (0, 1], for a layer that would be emptied (unless `allow_empty`), and where protected weights
    make the density unreachable.
    """
    if pool not in POOLS:
        raise UserError(f"Unknown pool {pool!r}; known: {', '.join(POOLS)}.")
    if isinstance(pattern, NofM):
        if density is not None and abs(density - pattern.n / pattern.m) > 1e-9:
            raise UserError(f"Mask pattern {pattern.name!r} has density {pattern.n / pattern.m:g}, but {density!r} was asked for.")
        return {name: pattern.mask(score, masks[name]) for name, score in scores.items()}
    if density is not None:
        check_density(density)
    pools = [list(scores)] if pool == "global" else [[name] for name in scores]
    chosen: dict[str, Tensor] = {}
    for names in pools:
        parts = [pattern.units(scores[name], masks[name]) for name in names]
        values = torch.cat([value for value, _ in parts])
        sizes = None if parts[0][1] is None else torch.cat([size for _, size in parts])
        total = sum(masks[name].numel() for name in names)
        alive = len(values) if sizes is None else int(sizes.sum())
        if density is None:
            count = int((values < torch.inf).sum() if sizes is None else sizes[values < torch.inf].sum())
        else:
            count = alive - keep_count(density, total)
        _check_reachable(values, sizes, count, total, "" if pool == "global" else f" in {names[0]!r}")
        keep = ~lowest_units(values, sizes, count)
        for name, (value, _) in zip(names, parts, strict=True):
            chosen[name] = pattern.spread(keep[: len(value)], masks[name])
            keep = keep[len(value) :]
    if not allow_empty:
        check_not_empty(chosen, masks)
    return chosen


def check_not_empty(chosen: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """`UserError` naming the first layer that has weights in `before` and none in `chosen`."""
    for name, mask in chosen.items():
        if not bool(mask.any()) and bool(before[name].any()):
            raise UserError(
                f"Pruning would remove every weight of {name!r}, which cuts the network; choose a higher density, local pruning or more "
                "iterations, or allow empty layers."
            )
