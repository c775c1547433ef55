"""One choice per layer out of a menu, least total loss under one or several budgets: the multiple-choice knapsack.

Symbols: layer l has options j with loss D[l][j] and costs C[l][j][b]; minimise sum_l D[l][x_l] subject to sum_l C[l][x_l][b] <= limit[b].
One budget: dynamic programming over what may be spent beyond the cheapest options, in units of the costs' common divisor where at most `UNITS` of them
make up the limit (exact), else of 1/UNITS of it, costs rounded up: the choice is then the best one under a limit lower by less than a unit per layer.
It takes layers x options x UNITS steps whatever the costs are.
Several budgets: a 0/1 program, solved by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack

from compress.errors import RunError, UserError

GAP = 1e-4  # relative optimality gap: far below the error of any loss estimate
SECONDS = 60.0
UNITS = 100_000


@dataclass(frozen=True)
class Option:
    """One way to treat a layer: the estimated loss, and what it costs in each budget's unit."""

    loss: float
    costs: tuple[float, ...]


def knapsack(menus: Sequence[Sequence[Option]], limits: Sequence[float]) -> list[int]:
    """The chosen option of each menu.

    Parameters
    ----------
    menus: for each layer its options, at least one.
    limits: for each budget the largest total cost.

    Raises
    ------
    UserError: no choice meets the limits; names the least total of the first that fails. RunError: the solver gave up.
    """
    for number, limit in enumerate(limits):
        least = sum(min(option.costs[number] for option in menu) for menu in menus)
        if least > limit:
            raise UserError(f"No choice of ranks meets the budget: at least {least:,.0f} remain, and {limit:,.0f} are allowed.")
    if len(limits) == 1:
        return _one_budget(menus, limits[0])
    options = [option for menu in menus for option in menu]
    loss = np.array([option.loss for option in options])
    costs = np.array([option.costs for option in options], dtype=float).T
    # Rows of very different magnitude upset the solver's tolerances.
    scale = np.array([max(limit, 1.0) for limit in limits])[:, None]
    one_each = block_diag([np.ones((1, len(menu))) for menu in menus], format="csr")
    matrix = vstack([one_each, csr_array(costs / scale)], format="csr")
    lower = np.concatenate([np.ones(len(menus)), np.full(len(limits), -np.inf)])
    upper = np.concatenate([np.ones(len(menus)), np.asarray(limits, dtype=float) / scale[:, 0]])
    with _silenced():
        found = milp(loss / max(loss.max(), 1e-300), constraints=LinearConstraint(matrix, lower, upper), integrality=np.ones(len(options)),
                     bounds=Bounds(0, 1), options={"mip_rel_gap": GAP, "time_limit": SECONDS})
    if found.x is None:
        raise UserError("No choice of ranks meets all budgets together.") if found.status == 2 else RunError(f"The rank allocation failed: {found.message}.")
    chosen, start = [], 0
    for menu in menus:
        chosen.append(int(np.argmax(found.x[start:start + len(menu)])))
        start += len(menu)
    return chosen


def _one_budget(menus: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """Least loss under one limit, by dynamic programming; the limit can be met."""
    least = [min(option.costs[0] for option in menu) for menu in menus]
    extra = [[option.costs[0] - low for option in menu] for menu, low in zip(menus, least, strict=True)]
    units, room = _units(extra, limit - sum(least))
    best, decided, finite = np.zeros(room + 1), [], [option.loss for menu in menus for option in menu if math.isfinite(option.loss)]
    worst = 1e6 * max((abs(loss) for loss in finite), default=1.0) + 1.0  # instead of a loss that is no number
    for menu, sizes in zip(menus, units, strict=True):
        reached, choice = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for index, (option, size) in enumerate(zip(menu, sizes, strict=True)):
            if size > room:
                continue
            total = best[: room + 1 - size] + (option.loss if math.isfinite(option.loss) else worst)
            better = total < reached[size:]
            reached[size:][better], choice[size:][better] = total[better], index
        best = reached
        decided.append(choice)
    chosen, left = [], room
    for choice, sizes in zip(reversed(decided), reversed(units), strict=True):
        chosen.append(int(choice[left]))
        left -= sizes[chosen[-1]]
    return chosen[::-1]


def _units(extra: list[list[float]], slack: float) -> tuple[list[list[int]], int]:
    """The costs beyond the cheapest in whole units, and how many of these the slack has."""
    if all(float(cost).is_integer() for costs in extra for cost in costs):
        divisor = max(1, math.gcd(*(int(cost) for costs in extra for cost in costs)))
        if slack // divisor <= UNITS:
            return [[int(cost) // divisor for cost in costs] for costs in extra], int(slack // divisor)
    if slack <= 0:
        return [[int(cost > 0) for cost in costs] for costs in extra], 0
    # the small share keeps a cost that is a whole number of units from being rounded up by its last bit
    return [[math.ceil(cost / slack * UNITS * (1 - 1e-12)) for cost in costs] for costs in extra], UNITS


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Standard output goes nowhere inside: HiGHS writes lines for its own developers there from C, whatever it is told."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # a process without standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
