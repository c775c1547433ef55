"""The same fraction of every group.

The j-th channel of a group of `size` leaves at the fraction (j - 1/2) / size: at any point every group has lost the same fraction of
its channels, rounded to a whole channel. Among groups that lose one at the same fraction the earlier group goes first, so that
the budget is met to a single channel. Scores only decide which channels of a group go.
"""

from __future__ import annotations

from compress.allocate import ALLOCATIONS
from compress.allocate.problem import Problem


@ALLOCATIONS.register("uniform")
def uniform(problem: Problem) -> dict[str, int]:
    """Channels that each group keeps, `{group name: width}`."""
    steps = [((rank + 0.5) / group.size, index) for index, group in enumerate(problem.groups) for rank in range(group.size)]
    return problem.along(index for _, index in sorted(steps))
