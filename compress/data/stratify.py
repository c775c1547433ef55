"""Choosing rows so that every class keeps its share: quotas by the largest remainder, rows at random or evenly spaced."""

from __future__ import annotations

import torch
from torch import Tensor


def quotas(sizes: Tensor, count: int, keep: int = 0) -> Tensor:
    """How many rows each class gives: `count` in all, in proportion to `sizes` [classes], each class keeping at least `keep`.

    Shares are rounded down and the largest remainders get one more (ties: the lower class). The sum is below `count` only where
    the classes cannot give as many.
    """
    room = (sizes - keep).clamp_min(0)
    count = min(count, int(room.sum()))
    share = sizes.double() * count / max(int(sizes.sum()), 1)
    quota = torch.minimum(share.floor().long(), room)
    while int(quota.sum()) < count:
        remainder = torch.where(quota < room, share - quota, torch.full_like(share, -torch.inf))
        quota[int(remainder.argmax())] += 1
    return quota


def stratified(labels: Tensor, count: int, *, keep: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """Ascending rows [<= count] chosen class by class from `labels` [n] int64: at random, or evenly spaced without a generator."""
    chosen = []
    for label, quota in enumerate(quotas(torch.bincount(labels), count, keep).tolist()):
        rows = torch.nonzero(labels == label).flatten()
        if generator is None:
            position = ((torch.arange(quota).double() + 0.5) * len(rows) / max(quota, 1)).long()
        else:
            position = torch.randperm(len(rows), generator=generator)[:quota]
        chosen.append(rows[position])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)
