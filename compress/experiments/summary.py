"""Statistics over seeds: mean, sample standard deviation, extremes, and paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def _key(row: dict[str, Any], keys: Sequence[str]) -> tuple:
    return tuple(row[key] for key in keys)


def summarise(rows: Sequence[dict[str, Any]], value: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per combination of `keys`: n, mean, std (None for one seed), low and high of `value`."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(_key(row, keys), []).append(row[value])
    return [
        dict(zip(keys, group, strict=True))
        | {
            "n": len(values),
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "low": min(values),
            "high": max(values),
        }
        for group, values in groups.items()
    ]


def paired(rows: Sequence[dict[str, Any]], value: str, against: str, confidence: float = 0.95) -> list[dict[str, Any]]:
    """For every arm but `against` and every target: the mean over seeds of arm minus `against`, and its Student t interval.

    Rows carry `arm`, `target` and `seed`. The interval is None for one seed.
    """
    table = {_key(row, ("arm", "target", "seed")): row[value] for row in rows}
    found = []
    for arm, target in dict.fromkeys((arm, target) for arm, target, _ in table if arm != against):
        gaps = [table[arm, target, seed] - table[against, target, seed] for a, t, seed in table if (a, t) == (arm, target)]
        half = None
        if len(gaps) > 1:
            half = float(stats.t.ppf((1 + confidence) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        mean = statistics.fmean(gaps)
        interval = None if half is None else [mean - half, mean + half]
        found.append({"arm": arm, "target": target, "n": len(gaps), "difference": mean, "interval": interval})
    return found
