"""The allocation problem: which widths each group may take, what they cost, and the search along a removal order.

Symbols: a group has `size` channels; `widths` are the numbers of channels it may keep, descending, first `size` itself;
removed(kept) = (original - quantity(kept)) / original, with quantity the exact parameters or MACs of the cut network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.registry import nearest

TOLERANCE = 0.01


@dataclass(frozen=True)
class Group:
    """One prunable group: its channels in removal order [size], their scores in that order [size], and the permitted widths."""

    name: str
    size: int
    order: Tensor
    scores: Tensor
    widths: tuple[int, ...]

    def fit(self, kept: int) -> int:
        """The largest permitted width that is at most `kept`; the smallest permitted one where there is none."""
        return next((width for width in self.widths if width <= kept), self.widths[-1])


@dataclass
class Problem:
    """A budget to be shared over `groups`; `removed` is exact and remembers what it has computed.

    `losses`: of each group the measured loss that each further channel adds, [size], in the order of removal; empty where none was measured.
    """

    graph: Any
    groups: list[Group]
    quantity: str
    ratio: float
    original: int
    lower: float
    limits: str
    losses: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def removed(self, kept: dict[str, int]) -> float:
        """The fraction of the original quantity that is gone when each group keeps `kept` channels."""
        key = tuple(kept[group.name] for group in self.groups)
        if key not in self._known:
            keep = {group.name: group.order[group.size - kept[group.name]:].sort().values for group in self.groups}
            self._known[key] = (self.original - _quantity(self.graph.count(keep), self.quantity)) / self.original
        return self._known[key]

    @property
    def most(self) -> float:
        """The largest fraction that can be removed."""
        return self.removed({group.name: group.widths[-1] for group in self.groups})

    def check_reachable(self) -> None:
        """Raise a UserError where no permitted choice of widths meets the budget."""
        if not self.groups:
            raise UserError(f"No channels of this network may be removed, so a budget of {self.ratio:g} of its {self.quantity} "
                            f"cannot be met{reasons(self.graph)}.")
        if self.most < self.lower:
            raise UserError(f"A budget that removes {self.ratio:g} of the {self.quantity} cannot be reached: at most "
                            f"{math.floor(self.most * 1e4) / 1e4:g} can be removed with {self.limits}.")

    def along(self, steps: Iterable[int]) -> dict[str, int]:
        """Remove one channel after another, each from the group with the given index, until the budget is met.

        The removed fraction grows with the number of steps, so that number is bisected; of the two neighbours of the budget the nearer
        one is taken. Where single channels are so large that both miss the tolerance, the walk goes on from the lower
        one and passes over those groups whose next channel is too large. The least bad choice seen is returned.
        """
        steps = list(steps)
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            if self.removed(self._after(steps[:middle])) < self.ratio:
                low = middle + 1
            else:
                high = middle
        seen = [self._after(steps[:low]), self._after(steps[:max(low - 1, 0)])]
        if not any(self._within(kept) for kept in seen):
            seen += self._fill(seen[1], steps[max(low - 1, 0):])
        return min(seen, key=lambda kept: (self.removed(kept) < self.lower, abs(self.removed(kept) - self.ratio)))

    def _within(self, kept: dict[str, int]) -> bool:
        return self.lower <= self.removed(kept) <= self.ratio + TOLERANCE

    def _after(self, steps: list[int]) -> dict[str, int]:
        counts = torch.bincount(torch.tensor(steps, dtype=torch.int64), minlength=len(self.groups)).tolist()
        return {group.name: group.fit(group.size - count) for group, count in zip(self.groups, counts)}

    def _fill(self, kept: dict[str, int], steps: list[int]) -> list[dict[str, int]]:
        seen: list[dict[str, int]] = []
        blocked: set[int] = set()
        for index in steps:
            group = self.groups[index]
            smaller = [width for width in group.widths if width < kept[group.name]]
            if index in blocked or not smaller:
                continue
            trial = kept | {group.name: smaller[0]}
            seen.append(trial)
            if self.removed(trial) > self.ratio + TOLERANCE:
                blocked.add(index)
            else:
                kept = trial
            if self._within(kept) or len(blocked) == len(self.groups):
                break
        return seen


def _quantity(count: tuple[int, int], quantity: str) -> int:
    return count[("params", "macs").index(quantity)]


def reasons(graph: Any) -> str:
    """Why groups are pinned, in brackets, for the end of a sentence; empty where none is."""
    found = list(dict.fromkeys(group.reason for group in graph.groups if not group.prunable and group.reason))
    return f" (why: {'; '.join(found[:3])})" if found else ""


def parse_budget(budget: dict[str, float]) -> tuple[str, float]:
    """(quantity, ratio) of a budget such as {"macs": 0.5}; UserError where it is anything else."""
    if not isinstance(budget, dict) or len(budget) != 1:
        raise UserError(f'A budget has one entry, {{"params": ratio}} or {{"macs": ratio}}, and this one is {budget!r}.')
    (quantity, ratio), = budget.items()
    if quantity not in ("params", "macs"):
        raise UserError(f"A budget for channels is in 'params' or 'macs', got {quantity!r}{nearest(str(quantity), ['params', 'macs'])}.")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise UserError(f"The ratio of a budget is the fraction removed, a number in [0, 1), and budget[{quantity!r}] is {ratio!r}.")
    return quantity, float(ratio)


def build_problem(graph: Any, scores: dict[str, Tensor], quantity: str, ratio: float, max_layer_ratio: float, round_to: int,
                  min_channels: int, original: int | None, losses: dict[str, Tensor] | None = None) -> Problem:
    """The problem over the groups that have scores, after checking everything that is given."""
    if not 0 < max_layer_ratio <= 1:
        raise UserError(f"max_layer_ratio is the largest fraction removed from a group, in (0, 1], and is {max_layer_ratio!r}.")
    if round_to < 1 or min_channels < 1:
        raise UserError(f"round_to and min_channels are at least 1, and are {round_to!r} and {min_channels!r}.")
    candidates = {group.name: group for group in graph.groups if group.prunable}
    for name in scores:
        if name not in candidates:
            raise UserError(f"Scores are given for {name!r}, which is no prunable channel group of this network"
                            f"{nearest(name, list(candidates))}.")
    groups = [_group(group, scores[name], max_layer_ratio, round_to, min_channels) for name, group in candidates.items() if name in scores]
    total = original if original is not None else _quantity(graph.count({}), quantity)
    limits = f"max_layer_ratio {max_layer_ratio:g}, round_to {round_to} and min_channels {min_channels} over {len(groups)} channel groups"
    return Problem(graph, groups, quantity, ratio, total, ratio if round_to > 1 else ratio - TOLERANCE, limits, losses or {})


def _group(group: Any, scores: Tensor, max_layer_ratio: float, round_to: int, min_channels: int) -> Group:
    scores = torch.as_tensor(scores).detach().to(device="cpu", dtype=torch.float64)
    if scores.shape != (group.size,):
        raise UserError(f"Group {group.name!r} has {group.size} channels, and its scores have the shape {tuple(scores.shape)}.")
    if torch.isnan(scores).any():
        raise UserError(f"The scores of group {group.name!r} hold values that are not numbers.")
    order = torch.argsort(scores, stable=True)
    # 1e-9: a cap of 0.9 over 10 channels is 9 of them although 0.9 * 10 may round to less.
    least = max(min_channels, group.size - math.floor(max_layer_ratio * group.size + 1e-9))
    narrower = range((group.size - 1) // round_to * round_to, least - 1, -round_to)
    return Group(group.name, group.size, order, scores[order], (group.size, *narrower))
