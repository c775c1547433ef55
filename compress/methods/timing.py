"""Budgets of latency: the fraction of the original network's time that a compressed one saves, and the search for a given one.

saved = 1 - t(compressed) / t(original), each t the time of one forward pass of the whole batch, both networks measured in turns by
`compress.latency.compare`. Times scatter, so a budget counts as met from `BELOW` under its ratio to `ABOVE` over it, and what was measured
stands in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.cost import batch_size
from compress.errors import UserError
from compress.latency import compare
from compress.undisturbed import arguments

BELOW, ABOVE = 0.01, 0.02
TRIALS = 10
NARROW = 2e-3  # two MAC ratios this close are the same network for any clock


@dataclass(frozen=True)
class Timing:
    """How a budget of latency is measured.

    Attributes
    ----------
    inputs: what the networks are timed on, on their device.
    seconds: shortest measuring time per network and comparison.
    threads: CPU threads while measuring; None: as torch is set.
    """

    inputs: Any
    seconds: float = 0.3
    threads: int | None = None

    def saved(self, original: nn.Module, compressed: nn.Module) -> float:
        """The fraction of the original's time that the compressed network saves; negative where it is slower."""
        timed = compare({"original": original, "compressed": compressed}, self.inputs, self.seconds, self.threads)
        return 1 - 1 / timed["compressed"].speedup

    def meta(self, ratio: float, saved: float) -> dict[str, Any]:
        """For the plan: what was asked for and what was measured."""
        return {"latency": {"asked": ratio, "saved": saved, "batch_size": batch_size(arguments(self.inputs))}}


def met(saved: float, ratio: float) -> bool:
    """Whether a measured saving meets the ratio."""
    return ratio - BELOW <= saved <= ratio + ABOVE


def unreachable(ratio: float, saved: float, by: str) -> UserError:
    """The error for a ratio that even the smallest network, which saves `saved`, does not reach."""
    return UserError(f"A budget that removes {ratio:g} of the latency cannot be reached on this device: the fastest network that {by} allows "
                     f"saves {saved:.3f}, measured in turns with the original.")


def search(ratio: float, most: float, saved: Callable[[float], float], by: str) -> tuple[float, float]:
    """(MAC ratio, measured saving) of the network that saves `ratio` of the latency, MAC ratios from 0 to `most`.

    The interval that holds the ratio is narrowed by interpolation between the savings at its ends, each step at least a tenth of it. Where no
    trial meets the ratio (the time jumps, or scatters), the largest network of those that save more is taken.

    Raises
    ------
    UserError: the network with `most` of its MACs removed saves less; `by` names who could not.
    """
    low, high = (0.0, 0.0), (most, math.nan)
    tried: list[tuple[float, float]] = []
    for trial in range(TRIALS):
        if trial == 0:
            at = min(ratio, most)
        elif math.isnan(high[1]):
            # time lags behind MACs: after two steps that fall short the end itself is asked
            at = most if trial > 2 else min(most, low[0] + 1.3 * (ratio - low[1]))
        else:
            share = (ratio - low[1]) / max(high[1] - low[1], 1e-9)
            at = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
        found = at, saved(at)
        tried.append(found)
        if met(found[1], ratio):
            return found
        if found[1] > ratio:
            high = found
        else:
            low = found
            if at >= most:
                raise unreachable(ratio, found[1], by)
        if not math.isnan(high[1]) and high[0] - low[0] < NARROW:
            break
    return min(found for found in tried if found[1] >= ratio - BELOW)
