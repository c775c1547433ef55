"""One threshold over the scores of all groups, with a cap on what each group may lose.

All channels of all groups are one list in ascending order of score; the shortest beginning of that list that meets the budget is
removed, passing over the channels of groups that have reached their cap. Equal scores go in the order of the fraction of
their group that is gone by then, so that ties are spread over the groups, and then in the order of the groups.
"""

from __future__ import annotations

from compress.allocate import ALLOCATIONS
from compress.allocate.problem import Problem


@ALLOCATIONS.register("global")
def global_threshold(problem: Problem) -> dict[str, int]:
    """Channels that each group keeps, `{group name: width}`."""
    steps = [(float(score), (rank + 1) / group.size, index)
             for index, group in enumerate(problem.groups) for rank, score in enumerate(group.scores)]
    return problem.along(index for _, _, index in sorted(steps))
