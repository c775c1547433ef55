"""Budgets of latency: the fraction of the original network's time that a compressed one saves, and the search for a given one.

saved = 1 - t(compressed) / t(original), each t the time of one forward pass of the whole batch, both networks measured in turns by
`compress.latency.compare`. Times scatter, so a budget counts as met from `BELOW` under its ratio to `ABOVE` over it, and what was measured
stands in the plan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from compress.cost import batch_size
from compress.errors import CompressError, RunError, UserError, cause
from compress.latency import compare, latency
from compress.undisturbed import arguments

BELOW, ABOVE = 0.01, 0.02
TRIALS = 10
NARROW = 2e-3  # of the whole range: two points this close are the same network for any clock


Choice = TypeVar("Choice")


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
        """The fraction of the original's time that the compressed network saves; negative where it is slower.

        Raises `RunError` where the compressed network does not run.
        """
        try:
            timed = compare({"original": original, "compressed": compressed}, self.inputs, self.seconds, self.threads)
        except CompressError:
            raise
        except Exception as error:
            raise RunError(f"The compressed network cannot be run ({cause(error)}); exclude the layers whose parts the module around them reads.") from error
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


def search(ratio: float, most: float, saved: Callable[[float], float], by: str, first: float | None = None) -> tuple[float, float]:
    """(x, measured saving) of the network that saves `ratio` of the latency; x, from 0 to `most`, says how much is removed, of MACs say.

    The interval that holds the ratio is narrowed by interpolation between the savings at its ends, each step at least a tenth of it, starting with `first` (None:
    the ratio). A network that meets the ratio is measured again, and the mean counts. Where no trial meets it (the time jumps, or scatters), the one with the
    least removed of those that save more is taken.

    Raises
    ------
    UserError: the network with `most` removed saves less; `by` names who could not.
    """
    low, high = (0.0, 0.0), (most, math.nan)
    tried: list[tuple[float, float]] = []
    for trial in range(TRIALS):
        if trial == 0:
            at = min(ratio if first is None else first, most)
        elif math.isnan(high[1]):
            # time lags behind what is removed: after two steps that fall short the end itself is asked
            at = most if trial > 2 else min(most, low[0] + 1.3 * max(ratio - low[1], 0.0) * (low[0] / low[1] if low[1] > 0 else 1.0))
        else:
            share = (ratio - low[1]) / max(high[1] - low[1], 1e-9)
            at = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
        gain = saved(at)
        if met(gain, ratio):
            gain = (gain + saved(at)) / 2
        tried.append((at, gain))
        if met(gain, ratio):
            return tried[-1]
        if gain > ratio:
            high = tried[-1]
        else:
            low = tried[-1]
            if at >= most:
                break
        if not math.isnan(high[1]) and high[0] - low[0] < NARROW * most:
            break
    enough = [one for one in tried if one[1] >= ratio - BELOW]
    if not enough:
        raise unreachable(ratio, max(gain for _, gain in tried), by)
    return min(enough)


def meet(ratio: float, clock: Timing, original: nn.Module, current: nn.Module, times: tuple[float, float], pick: Callable[[float], Choice],
         build: Callable[[Choice], nn.Module], by: str) -> tuple[Choice, float]:
    """(choice, measured saving): `ratio` of the original's latency saved by a network whose layers' times are known.

    A network's time is not the sum of its layers' (activations, caches, calls), so what the layers have to save is searched for, the whole network being measured.

    Parameters
    ----------
    original: the uncompressed network. current: the one that is compressed, the same or compressed before.
    times: nanoseconds of the current network's layers as they are, and the least that they can be brought to.
    pick: the choice whose layers take at most so many nanoseconds. build: the network of a choice, weights of any values; `current` itself where nothing changes.

    Raises
    ------
    UserError: the fastest network saves less; `by` names who could not.
    """
    dense, least = times
    total = latency(original, clock.inputs, clock.seconds, clock.threads).median_ms * 1e6
    before = 0.0 if current is original else clock.saved(original, current)
    at = functools.cache(lambda share: pick(max(least, dense - share * (dense - least))))

    def saved(share: float) -> float:
        network = build(at(share))
        return before if network is current else clock.saved(original, network)

    share, found = search(ratio, 1.0, saved, by, first=max(0.0, (ratio - before) * total / max(dense - least, 1e-9)))
    return at(share), found
