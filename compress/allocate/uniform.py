"""The same fraction of every group.

Channels leave the groups in the order of the fraction of their group that is gone with half of them, (j - 1/2) / size for the j-th: at any point
a group of `size` channels has lost a common fraction of them, rounded to a whole channel. Groups at the same fraction go
in their own order, so that the budget is met to a single channel. Scores only decide which channels of a group go.
"""

from __future__ import annotations

from compress.allocate import ALLOCATIONS
from compress.allocate.problem import Problem


@ALLOCATIONS.register("uniform")
def uniform(problem: Problem) -> dict[str, int]:
    """Channels that each group keeps, `{group name: width}`."""
    steps = [((rank + 0.5) / group.size, index) for index, group in enumerate(problem.groups) for rank in range(group.size)]
    return problem.along(index for _, index in sorted(steps))
