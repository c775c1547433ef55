"""One choice per layer out of a menu, least total loss under one or several budgets: the multiple-choice knapsack, solved exactly.

Symbols: layer l has options j with loss D[l][j] and costs C[l][j][b]; minimise sum_l D[l][x_l] subject to sum_l C[l][x_l][b] <= limit[b].
Solved as a 0/1 program by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

import contextlib
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
