"""Least measured loss per unit of the budget: what removing channels of each group by itself was seen to cost decides how many go.

Scores decide which channels of a group go, `Problem.losses` how the groups compare: loss l[k] that the k-th channel in the order of removal
adds (`compress.allocate.curves`). Channels of all groups are removed in ascending order of l[k] / saving, with the group's saving per channel
measured at the middle of its permitted widths: the Lagrangian of "least total loss under a budget" for separate, convex losses.
"""

from __future__ import annotations

from compress.allocate import ALLOCATIONS
from compress.allocate.problem import Problem
from compress.errors import UserError


@ALLOCATIONS.register("measured")
def measured(problem: Problem) -> dict[str, int]:
    """Channels that each group keeps, `{group name: width}`."""
    missing = [group.name for group in problem.groups if group.name not in problem.losses]
    if missing:
        raise UserError(f"Allocation 'measured' needs the measured loss of every channel group, and got none for {missing[0]!r}; "
                        "pass losses=... (compress.allocate.curves.measure), or choose 'global' or 'uniform'.")
    full = {group.name: group.size for group in problem.groups}
    steps = []
    for index, group in enumerate(problem.groups):
        middle = group.widths[len(group.widths) // 2]
        saving = (problem.removed(full | {group.name: middle}) - problem.removed(full)) / max(1, group.size - middle)
        for rank, loss in enumerate(problem.losses[group.name].tolist()):
            steps.append((loss / saving if saving > 0 else float("inf"), (rank + 1) / group.size, index))
    return problem.along(index for _, _, index in sorted(steps))
