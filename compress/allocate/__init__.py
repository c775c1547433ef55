"""Allocation: how a budget is shared over the channel groups, given a score for each channel.

One file per allocation, found by its registered name. An allocation is a function from a `Problem` (sizes, scores, permitted
widths, and the exact parameters and MACs of any choice of widths) to the number of channels that each group keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from compress.allocate.problem import Problem, build_problem, parse_budget
from compress.errors import UserError
from compress.registry import Registry

ALLOCATIONS: Registry[Callable[[Problem], dict[str, int]]] = Registry("allocation", "compress.allocate")

__all__ = ["ALLOCATIONS", "Problem", "allocate", "check_ratio", "largest"]


def allocate(graph: Any, scores: dict[str, Tensor], budget: dict[str, float], kind: str = "global", max_layer_ratio: float = 0.95,
             round_to: int = 1, min_channels: int = 1, original: int | None = None,
             losses: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The channels to remove from each group so that the budget is met: `{group name: int64 [removed], ascending}`.

    Within a group the lowest scores go first, equal ones in the order of their index. Groups that lose nothing are left out.

    Parameters
    ----------
    graph: the channel graph; `graph.count(keep)` gives exact parameters and MACs of a cut network.
    scores: `{group name: [size]}`, low = remove first. A prunable group that is not listed keeps all its channels.
    budget: `{"params": ratio}` or `{"macs": ratio}`; ratio is the fraction REMOVED of the whole network's quantity, in [0, 1).
    kind: a registered allocation, "global", "uniform" or "measured".
    max_layer_ratio: largest fraction of a group's channels that may be removed, in (0, 1].
    round_to: groups that lose channels keep a multiple of this many; the budget is then met from below (at least `ratio` is
        removed). Groups too narrow for such a width keep all their channels.
    min_channels: each group keeps at least so many channels.
    original: the quantity that the ratio is taken of (parameters or MACs per image); the traced network's where it is None.
    losses: for "measured", the loss that each further channel of a group adds, `{group name: [size]}` (`compress.allocate.curves.measure`).

    Returns with a removed fraction within 0.01 of the ratio wherever single channels (or blocks of `round_to`) are fine enough.

    Raises
    ------
    UserError: malformed budget or scores, no prunable group, a ratio that cannot be reached (naming the largest that can).
    """
    quantity, ratio = parse_budget(budget)
    problem = build_problem(graph, scores, quantity, ratio, max_layer_ratio, round_to, min_channels, original, losses)
    if ratio == 0:
        return {}
    choose = ALLOCATIONS[kind]
    problem.check_reachable()
    kept = choose(problem)
    removed = {group.name: group.order[:group.size - kept[group.name]].sort().values for group in problem.groups}
    return {name: channels for name, channels in removed.items() if len(channels)}


def largest(graph: Any, quantity: str = "macs", max_layer_ratio: float = 0.95, round_to: int = 1, min_channels: int = 1,
            names: Collection[str] | None = None) -> float:
    """The largest ratio of `quantity` ("params" or "macs") that `allocate` can remove; 0 where nothing may be pruned.

    `names`: the groups that have scores (`Criterion.check` tells them before there are any); all prunable ones where None.
    """
    parse_budget({quantity: 0.0})
    return build_problem(graph, _equal_scores(graph, names), quantity, 0.0, max_layer_ratio, round_to, min_channels, None).most


def check_ratio(graph: Any, budget: dict[str, float], names: Collection[str] | None = None, **limits: Any) -> None:
    """Raise the UserError that `allocate` would raise for an unreachable budget, without scores. `names`, `limits`: as in `largest`."""
    quantity, ratio = parse_budget(budget)
    if ratio > 0:
        settings = {"max_layer_ratio": 0.95, "round_to": 1, "min_channels": 1, "original": None} | limits
        build_problem(graph, _equal_scores(graph, names), quantity, ratio, **settings).check_reachable()


def _equal_scores(graph: Any, names: Collection[str] | None) -> dict[str, Tensor]:
    return {group.name: torch.zeros(group.size) for group in graph.groups if group.prunable and (names is None or group.name in names)}
