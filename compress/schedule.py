"""When how much is pruned: sparsity as a function of progress t in [0, 1], from s_i to s_f; and learning rates beside it.

| name | sparsity s(t) | source |
|---|---|---|
| one_shot | s_f for t > 0 | |
| linear | s_i + (s_f - s_i) t | |
| geometric | 1 - (1 - s_i)^(1-t) (1 - s_f)^t, the same share of the survivors goes at every step | Tanaka et al. 2020 (density rho^t) |
| cubic | s_f + (s_i - s_f) (1 - t)^3 | Zhu & Gupta 2017, arXiv:1710.01878 |
| cosine | s_f + (s_i - s_f) (1 + cos(pi t)) / 2 | |
| one_cycle | s_i + (s_f - s_i) (1 + e^(b-a)) / (1 + e^(b-at)), a = 14, b = 6 | Hubens et al. 2021, arXiv:2107.02086 |

Every schedule is non-decreasing and ends at s_f exactly. Sparsities are fractions of all prunable weights, never of the survivors;
`step_rates` converts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.errors import UserError
from compress.registry import nearest

_STEEPNESS, _OFFSET = 14.0, 6.0


def _fraction(name: str, t: float) -> float:
    """Share of the way from s_i to s_f, for the schedules that are affine in (s_i, s_f)."""
    if name == "one_shot":
        return 1.0 if t > 0 else 0.0
    if name == "linear":
        return t
    if name == "cubic":
        return 1 - (1 - t) ** 3
    if name == "cosine":
        return (1 - math.cos(math.pi * t)) / 2
    return (1 + math.exp(_OFFSET - _STEEPNESS)) / (1 + math.exp(_OFFSET - _STEEPNESS * t))


SCHEDULES = ("one_shot", "linear", "geometric", "cubic", "cosine", "one_cycle")


def sparsity_at(name: str, t: float, final: float, start: float = 0.0) -> float:
    """Sparsity of schedule `name` at progress `t` (clipped to [0, 1]); `final` >= `start`, both in [0, 1)."""
    _check(name, final, start)
    t = min(max(t, 0.0), 1.0)
    if t == 1.0:
        return final
    if name == "geometric":
        return 1 - (1 - start) ** (1 - t) * (1 - final) ** t
    share = _fraction(name, t)
    return (1 - share) * start + share * final


def _check(name: str, final: float, start: float) -> None:
    if name not in SCHEDULES:
        raise UserError(f"Unknown pruning schedule {name!r}{nearest(name, list(SCHEDULES))}; known: {', '.join(SCHEDULES)}.")
    if not (0 <= start < 1 and 0 <= final < 1 and start <= final):
        raise UserError(f"A pruning schedule needs sparsities 0 <= start <= final < 1, got start {start!r} and final {final!r}.")


def targets(name: str, steps: int, final: float, start: float = 0.0) -> list[float]:
    """Sparsity after each of `steps` prunes, at t = 1/steps, 2/steps, ..., 1."""
    if steps < 1:
        raise UserError(f"A pruning schedule needs at least 1 step, got {steps!r}.")
    return [sparsity_at(name, (index + 1) / steps, final, start) for index in range(steps)]


def explicit(sparsities: Sequence[float]) -> list[float]:
    """A list of cumulative sparsities, checked: non-empty, non-decreasing, each in [0, 1)."""
    values = [float(value) for value in sparsities]
    if not values or any(not 0 <= value < 1 for value in values) or sorted(values) != values:
        raise UserError(
            f"An explicit pruning schedule is a non-empty, non-decreasing list of sparsities in [0, 1), got {list(sparsities)!r}."
        )
    return values


def step_rates(sparsities: Sequence[float], start: float = 0.0) -> list[float]:
    """Share of the survivors that each prune removes; prod(1 - p_k) = (1 - s_f) / (1 - start)."""
    rates, before = [], start
    for value in explicit(sparsities):
        rates.append(1 - (1 - value) / (1 - before))
        before = value
    return rates


def learning_rate(name: str, t: float, **options: float | Sequence[float]) -> float:
    """Factor on the peak learning rate at progress `t` in [0, 1].

    `constant`; `multistep` (milestones, gamma); `cosine` (final: the last factor); `one_cycle` (warm-up share `pct_start` from
    1/div, then down to 1/(div * final_div), both along a cosine: Smith 2018, arXiv:1803.09820).
    """
    t = min(max(t, 0.0), 1.0)
    if name == "constant":
        return 1.0
    if name == "multistep":
        gamma = options.get("gamma", 0.1)
        return gamma ** sum(t >= milestone for milestone in options.get("milestones", (0.5, 0.75)))
    if name == "cosine":
        last = options.get("final", 0.0)
        return last + (1 - last) * (1 + math.cos(math.pi * t)) / 2
    if name == "one_cycle":
        first, rise = 1 / options.get("div", 10.0), options.get("pct_start", 0.1)
        last = first / options.get("final_div", 100.0)
        low, phase = (first, 1 - t / rise) if t < rise else (last, (t - rise) / (1 - rise))
        return low + (1 - low) * (1 + math.cos(math.pi * phase)) / 2
    known = ["constant", "multistep", "cosine", "one_cycle"]
    raise UserError(f"Unknown learning-rate schedule {name!r}{nearest(name, known)}; known: {', '.join(known)}.")
