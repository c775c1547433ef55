"""The report's opening sentences, computed from the rows: what was removed, what it cost in accuracy, what it gained in time.

The best network at a ratio is the one with the highest mean accuracy over its seeds, named only among networks of the same budget and
ratio. Nothing is rounded before it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import Row, timing_label, timings
from .series import DENSE, QUANTITIES, Group, Value, dense_row, groups, methods, speedup, value

MISSED = {"params": 0.01, "macs": 0.01, "latency": 0.02}  # of latency what counts as met above the ratio (`compress.methods.timing.ABOVE`)


@dataclass(frozen=True)
class Sentence:
    """One statement; `warning` marks what a reader should not overlook."""

    text: str
    warning: bool = False


def sentences(rows: Sequence[Row], meta: Mapping[str, Any]) -> list[Sentence]:
    """The summary of a run: the dense network, the best network at each ratio, then warnings."""
    pruned = [group for group in groups(rows) if group.method != DENSE]
    result = [Sentence(text) for text in (_dense(rows, meta), *_best(rows, pruned)) if text]
    if not pruned:
        result.append(Sentence("No compressed network has been measured yet.", warning=True))
    return result + [
        Sentence(text, warning=True) for text in (*(meta.get("unreachable") or ()), *_slower(rows, pruned), *_missed(pruned), *_unmeasured(rows), *_noise(rows, meta)) if text
    ]


def count(number: float) -> str:
    """A count with its unit prefix and three digits: 272474 -> 272 k."""
    for limit, factor, prefix in ((1e3, 1, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M"), (math.inf, 1e9, " G")):
        if abs(number) < limit:
            scaled = number / factor
            return (f"{scaled:.0f}" if factor == 1 or abs(scaled) >= 100 else f"{scaled:.3g}") + prefix
    raise AssertionError


def rounded(number: float, digits: int = 3) -> str:
    """A number with that many significant digits, its zeros kept and without an exponent: 3.00, 0.000527, 1591."""
    places = digits - 1 - math.floor(math.log10(abs(number))) if number else 0
    return f"{number:.{max(places, 0)}f}"


def signed(number: float, digits: int = 3) -> str:
    """A difference with its sign, zero without one."""
    text = f"{abs(number):.{digits}f}"
    return text if float(text) == 0 else ("\N{MINUS SIGN}" if number < 0 else "+") + text


def percent(fraction: float) -> str:
    """A fraction in percent with one decimal."""
    return f"{100 * fraction:.1f} %"


def _dense(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    row = dense_row(rows)
    if row is None:
        return ""
    model = (meta.get("config") or {}).get("model") or {}
    name = model.get("import") or model.get("name")
    text = f"The unpruned network{f' ({name})' if name else ''} has {count(row['params'])} parameters"
    text += f" and {count(row['macs'])} MACs per image"
    accuracy = value([row], "accuracy")
    text += f" and reaches an accuracy of {accuracy.mean:.3f}" if accuracy else ""
    times = [f"{rounded(value([row], f'latency:{timed}').mean)} ms at {timing_label(timed)}" for timed in timings([row])]
    return text + (f"; one forward pass takes {' and '.join(times)} (median)" if times else "") + "."


def _best(rows: Sequence[Row], pruned: Sequence[Group]) -> list[str]:
    result = []
    for budget, ratio in sorted({(group.budget, group.ratio) for group in pruned}):
        rivals = [
            (accuracy, group)
            for group in pruned
            if (group.budget, group.ratio) == (budget, ratio) and (accuracy := value(group.rows, "accuracy"))
        ]
        if not rivals:
            continue
        rivals.sort(key=lambda pair: -pair[0].mean)
        accuracy, best = rivals[0]
        lead = f"{best.method} is best of {len(rivals)} methods" if len(rivals) > 1 else f"{best.method}"
        if len(rivals) > 1 and max(accuracy.low, rivals[1][0].low) <= min(accuracy.high, rivals[1][0].high):
            lead += f" (level with {rivals[1][1].method}: " + ("their seeds overlap)" if accuracy.count > 1 else "equal accuracy)")
        elif len(rivals) > 1:
            lead += f" ({accuracy.mean - rivals[1][0].mean:.3f} ahead of {rivals[1][1].method})"
        start = f"At ratio {ratio:g} of the {QUANTITIES.get(budget, budget)}, {lead}"
        result.append(f"{start}: {_removed(best)}{_cost(best, accuracy)}{_gain(rows, best)}.")
    return result


def _removed(group: Group) -> str:
    density = value(group.rows, "density")
    if density:
        left = value(group.rows, "macs_nonzero")
        return f"density {density.mean:.3f}" + (f" ({count(left.mean)} MACs with non-zero weights left)" if left else "")
    parts = [
        f"{percent(part.mean)} of the {name}"
        for key, name in (("macs_removed", "MACs"), ("params_removed", "parameters"))
        if (part := value(group.rows, key))
    ]
    return f"removed {' and '.join(parts)}" if parts else "removed an uncounted part"


def _cost(group: Group, accuracy: Value) -> str:
    seeds = f" (mean of {accuracy.count} seeds, {accuracy.low:.3f} to {accuracy.high:.3f})" if accuracy.count > 1 else ""
    base = value(group.rows, "accuracy_base")
    if base is None:
        return f", accuracy {accuracy.mean:.3f}{seeds}"
    return f", accuracy {base.mean:.3f} \N{RIGHTWARDS ARROW} {accuracy.mean:.3f} ({signed(accuracy.mean - base.mean)}){seeds}"


def _gain(rows: Sequence[Row], group: Group) -> str:
    dense = [row for row in rows if row["method"] == DENSE]
    parts = []
    for timed in timings(rows):
        gain = speedup(dense, group.rows, timed)
        if gain is None:
            continue
        slower = ", slower than dense," if gain.mean < 1 else ""
        doubt = "within the spread, " if gain.low <= 1 <= gain.high else ""
        spread = f"{doubt}p10 to p90: {gain.low:.2f} to {gain.high:.2f}"
        parts.append(f"{gain.mean:.2f}\N{MULTIPLICATION SIGN} the speed{slower} at {timing_label(timed)} ({spread})")
    return f", {' and '.join(parts)}" if parts else ""


def _slower(rows: Sequence[Row], pruned: Sequence[Group]) -> list[str]:
    dense = [row for row in rows if row["method"] == DENSE]
    result = []
    for timed in timings(rows):
        gains = [(group, gain) for group in pruned if (gain := speedup(dense, group.rows, timed))]
        slow = [
            f"{group.method} at {group.ratio:g} ({gain.mean:.2f}\N{MULTIPLICATION SIGN}{', within the spread' if gain.high >= 1 else ''})"
            for group, gain in gains
            if gain.mean < 1
        ]
        if slow:
            result.append(
                f"Slower than the unpruned network at {timing_label(timed)}: {len(slow)} of {len(gains)} networks: {', '.join(slow)}."
            )
    return result


def _missed(pruned: Sequence[Group]) -> list[str]:
    found: dict[float, list[str]] = {}
    for group in pruned:
        removed, bound = value(group.rows, f"{group.budget}_removed") if group.budget in MISSED else None, MISSED.get(group.budget, 0.0)
        if removed and max(abs(removed.low - group.ratio), abs(removed.high - group.ratio)) > bound:
            found.setdefault(bound, []).append(f"{group.method} at {group.ratio:g}: {percent(removed.mean)}")
    return [f"Budget not met within {percent(bound)}; removed instead: {', '.join(missed)}." for bound, missed in found.items()]


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    missing = [f"{row['method']} at {row['ratio']:g}, seed {row.get('seed', 0)}" for row in rows if row.get("accuracy") is None]
    result = [f"No accuracy is known for: {', '.join(missing)}."] if missing else []
    if rows and not timings(rows):
        result.append("Latency was not measured, so nothing here says that a network is faster.")
    elif rows and dense_row(rows) is None and methods(rows):
        result.append("The unpruned network was not measured, so no speed-up can be given.")
    return result


def _noise(rows: Sequence[Row], meta: Mapping[str, Any]) -> list[str]:
    sizes, row = meta.get("data"), dense_row(rows)
    size = sizes.get("test") if isinstance(sizes, Mapping) else None
    if not size or row is None or row.get("accuracy") is None:
        return []
    error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / size)
    return [
        f"The test set has {size} images: one image is {1 / size:.4f}, and the standard error of an accuracy of {row['accuracy']:.3f} "
        f"is {error:.4f}; smaller differences may be chance."
    ]
