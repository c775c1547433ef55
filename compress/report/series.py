"""From rows to the numbers that the report quotes and draws: pure functions, no drawing.

Rows that differ only in the seed are one point: the mean over the seeds, with the smallest and largest value as its range. For a
latency each row gives its median, and the range is the smallest p10 to the largest p90. The speed-up of a row over the dense one is the
one that was measured with both networks in turns; without that it is `median_dense / median_row`, and its range is
`p10_dense / p90_row .. p90_dense / p10_row`, the widest that the two spreads allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .results import Row, timing

DENSE = "dense"
QUANTITIES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


@dataclass(frozen=True)
class Value:
    """A mean with its range over `count` rows."""

    mean: float
    low: float
    high: float
    count: int = 1

    @property
    def spread(self) -> bool:
        """Whether the range is more than the value itself."""
        return self.high > self.low


@dataclass(frozen=True)
class Point:
    """One point of a figure, with what a reader sees when pointing at it."""

    x: Value
    y: Value
    label: str = ""


@dataclass(frozen=True)
class Series:
    """The points of one line, in drawing order; `style` numbers its colour and marker, -1 is the dense network."""

    name: str
    points: tuple[Point, ...]
    style: int = 0
    hollow: bool = False
    markers: bool = True


@dataclass(frozen=True)
class Group:
    """Rows of one method, budget and ratio, one per seed."""

    method: str
    budget: str
    ratio: float
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def masked(self) -> bool:
        """Whether the networks keep their shape and only hold zeros."""
        return any(row.get("density") is not None for row in self.rows)


def methods(rows: Iterable[Row]) -> list[str]:
    """Names of the compression methods in order of appearance, without `dense`."""
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != DENSE]


def dense_row(rows: Iterable[Row]) -> Row | None:
    """The row of the unpruned network, if there is one."""
    return next((row for row in rows if row["method"] == DENSE), None)


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows gathered over seeds: methods in order of appearance, then budgets, then ascending ratios."""
    rows = list(rows)
    keys = dict.fromkeys((row["method"], row["budget"], row["ratio"]) for row in rows)
    order = {name: index for index, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    return [
        Group(*key, tuple(row for row in rows if (row["method"], row["budget"], row["ratio"]) == key))
        for key in sorted(keys, key=lambda key: (order[key[0]], key[1], key[2]))
    ]


def value(rows: Iterable[Row], key: str) -> Value | None:
    """Mean and range of a column; None where no row has it.

    `key` is a column of numbers, `latency:<timing>` (see `compress.report.results.timings`), or `effective_gflops`: what is left to
    multiply in 1e9 FLOPs, for a masked network the products with non-zero weights, otherwise `gflops`.
    """
    rows = list(rows)
    if key.startswith("latency:"):
        found = [latency for row in rows if (latency := timing(row, key[8:]))]
        if not found:
            return None
        low, high = (bound([_or(entry.get(name), entry["median"]) for entry in found]) for bound, name in ((min, "p10"), (max, "p90")))
        return Value(fmean(entry["median"] for entry in found), low, high, len(found))
    numbers = [number for row in rows if (number := _effective_gflops(row) if key == "effective_gflops" else row.get(key)) is not None]
    return Value(fmean(numbers), min(numbers), max(numbers), len(numbers)) if numbers else None


def delta(row: Row) -> float | None:
    """`accuracy - accuracy_base`, or None where one of them is not known."""
    accuracy, base = row.get("accuracy"), row.get("accuracy_base")
    return None if accuracy is None or base is None else accuracy - base


def speedup(dense: Iterable[Row], rows: Iterable[Row], name: str) -> Value | None:
    """How many times faster than the dense network `rows` run in the timing `name`; None where a latency is missing or zero."""
    rows = list(rows)
    paired = [latency for row in rows if (latency := timing(row, name))]
    if paired and all(latency.get(key) is not None for latency in paired for key in ("speedup", "speedup_p10", "speedup_p90")):
        bounds = [latency[key] for latency in paired for key in ("speedup_p10", "speedup_p90")]
        return Value(fmean(latency["speedup"] for latency in paired), min(bounds), max(bounds), len(paired))
    old, new = value(dense, f"latency:{name}"), value(rows, f"latency:{name}")
    if old is None or new is None or min(new.mean, new.low) <= 0:
        return None
    return Value(old.mean / new.mean, old.low / new.high, old.high / new.low, new.count)


def series(rows: Sequence[Row], x: str, y: str, budget: str | None = None) -> list[Series]:
    """One series per method for a figure of column `y` against column `x`, the dense network last; see `value` for columns.

    Only rows of `budget` where it is given (the dense one always). Points are in ascending order of the ratio; those without a value are
    left out, and so is a method without points. The style is the method's number among all `rows`, so that it is the same in every figure.
    """
    style = {name: index for index, name in enumerate(methods(rows))} | {DENSE: -1}
    result = []
    for name in [*methods(rows), DENSE]:
        chosen = [group for group in groups(rows) if group.method == name and (budget in (None, group.budget) or name == DENSE)]
        for masked in (False, True):
            points = [
                Point(a, b, name if name == DENSE else f"{name}, ratio {group.ratio:g} of {QUANTITIES.get(group.budget, group.budget)}")
                for group in chosen
                if group.masked == masked
                if (a := value(group.rows, x)) is not None and (b := value(group.rows, y)) is not None
            ]
            if points:
                result.append(Series(name, tuple(points), style[name], hollow=masked))
    return result


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats: none has a smaller or equal x and a larger or equal y, one of them strictly. Ascending in x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x.mean, -point.y.mean)):
        if not front or point.y.mean > front[-1].y.mean:
            front.append(point)
    return front


def _effective_gflops(row: Row) -> float | None:
    return row.get("gflops") if row.get("macs_nonzero") is None else 2e-9 * row["macs_nonzero"]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
