"""What a figure shows, apart from how it is drawn: the same `Chart` becomes inline SVG in the page and a PNG file.

Limits and ticks are chosen here, so that both drawings agree and a test can read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import Row, entry_name, timing_label, timings
from .series import DENSE, QUANTITIES, Point, Series, Value, groups, methods, pareto, series

MASKED_GFLOPS = "Their GFLOPs count products with non-zero weights only, which dense kernels do not save."
SMALLEST_SPAN = 0.04
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Chart:
    """A figure of lines or points. `front` are the points that no other beats; `names` label whole numbers on the x axis."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    front: tuple[Point, ...] = ()
    names: tuple[str, ...] = ()
    note: str = ""


def ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten that enclose [low, high], about `count` intervals."""
    if high <= low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in STEPS if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def whole_ticks(low: float, high: float, count: int = 8) -> tuple[float, ...]:
    """Whole numbers in [low, high], `low` and multiples of 1, 2 or 5 times a power of ten, at most about `count`."""
    raw = max(1.0, (high - low) / count)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    start = math.ceil(low)
    return tuple(
        dict.fromkeys(
            [
                float(start),
                *(
                    float(tick)
                    for tick in range(-(-start // step) * step, math.floor(high) + 1, step)
                    if tick - start >= step / 2 or tick == start
                ),
            ]
        )
    )


def tick_text(number: float) -> str:
    """A tick's label; minus sign as in print."""
    return f"{number:.6g}".replace("-", "\N{MINUS SIGN}")


def make(
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    found: Sequence[Series],
    *,
    x_zero: bool = False,
    x_end: float | None = None,
    x_whole: bool = False,
    y_zero: bool = False,
    fraction: bool = False,
    **fields: Any,
) -> Chart | None:
    """A chart around `found`, or None without points.

    `x_zero`, `y_zero`: the axis starts at 0; `x_end`: the x axis ends there; `x_whole`: ticks at whole numbers; `fraction`: y stays in
    [0, 1].
    """
    points = [point for one in found for point in one.points]
    if not points:
        return None
    x_low, x_high = min(point.x.low for point in points), max(point.x.high for point in points)
    x_ticks = whole_ticks(x_low, x_high) if x_whole else ticks(0 if x_zero else x_low, x_high if x_end is None else x_end, 6)
    y_low, y_high = min(point.y.low for point in points), max(point.y.high for point in points)
    if fraction:
        # Noise should not fill a figure.
        y_low = min(y_low, max(y_high - SMALLEST_SPAN, 0.0))
    y_ticks = ticks(0 if y_zero else y_low, y_high)
    x_limits = (min(x_ticks[0], x_low), max(x_ticks[-1], x_high))
    y_limits = (y_ticks[0], y_ticks[-1])
    if fraction:
        y_ticks = tuple(tick for tick in y_ticks if 0 <= tick <= 1)
        y_limits = (max(y_limits[0], 0.0), min(y_limits[1], 1.0))
    pad = 0.02 * (x_limits[1] - x_limits[0]) or 0.5
    return Chart(
        key,
        title,
        x_label,
        y_label,
        tuple(found),
        x_ticks,
        y_ticks,
        (x_limits[0] - (0 if x_zero else pad), x_limits[1] + pad),
        y_limits,
        **fields,
    )


def result_charts(rows: Sequence[Row]) -> list[Chart]:
    """Accuracy against GFLOPs, against latency at each batch size, and against the ratio of each budget, before and after fine-tuning."""
    against = [("accuracy_gflops", "Accuracy against GFLOPs", "GFLOPs per image (2 per MAC)", "effective_gflops")]
    against += [
        (
            f"accuracy_latency_b{name}",
            f"Accuracy against latency, {timing_label(name)}",
            f"latency at {timing_label(name)} in ms, median (bar: p10 to p90)",
            f"latency:{name}",
        )
        for name in timings(rows)
    ]
    result = []
    for key, title, x_label, x in against:
        found = series(rows, x, "accuracy")
        front = tuple(pareto(point for one in found for point in one.points))
        note = ("Grey line: the networks that no other beats on both axes. " if len(front) > 1 else "") + _hollow(found)
        note += MASKED_GFLOPS if key == "accuracy_gflops" and _hollow(found) else ""
        result.append(make(key, title, x_label, "test accuracy", found, x_zero=True, fraction=True, note=note.strip(), front=front))
    for budget in dict.fromkeys(row["budget"] for row in rows if row["method"] != DENSE):
        for column, key, title in (
            ("accuracy", "accuracy_ratio", "Accuracy against ratio"),
            ("accuracy_oneshot", "oneshot_ratio", "Accuracy before fine-tuning against ratio"),
        ):
            found = series(rows, "ratio", column, budget)
            if any(one.name != DENSE for one in found):
                result.append(
                    make(
                        f"{key}_{budget}",
                        f"{title} of {QUANTITIES.get(budget, budget)}",
                        f"fraction of {QUANTITIES.get(budget, budget)} removed (ratio)",
                        "test accuracy",
                        found,
                        x_zero=True,
                        x_end=1.0,
                        fraction=True,
                        note=_hollow(found).strip(),
                    )
                )
    return [chart for chart in result if chart is not None]


def width_charts(rows: Sequence[Row], details: Mapping[str, Any]) -> list[Chart]:
    """Per method the kept fraction of every layer's width (or rank), one line per ratio of the method's first seed."""
    result = []
    for method in methods(rows):
        found, names = [], ()
        for index, group in enumerate(group for group in groups(rows) if group.method == method):
            sizes, what = layer_sizes(details.get(entry_name(group.rows[0])) or {})
            if not sizes:
                continue
            names = tuple(name for name, _, _ in sizes)
            points = tuple(
                Point(
                    exact(place),
                    exact(product(after) / max(product(before), 1)),
                    f"{name}: {what} {size_text(before)} to {size_text(after)}",
                )
                for place, (name, before, after) in enumerate(sizes, 1)
            )
            found.append(
                Series(f"ratio {group.ratio:g} of {QUANTITIES.get(group.budget, group.budget)}", points, index, markers=len(points) <= 40)
            )
        chart = make(
            f"widths_{method}",
            f"Kept per layer, {method}",
            "layer, from input to output",
            "kept fraction of the width or rank",
            found,
            x_whole=True,
            y_zero=True,
            fraction=True,
            names=names,
        )
        result += [chart] if chart else []
    return result


def history_chart(key: str, title: str, histories: Mapping[str, Sequence[Mapping[str, Any]]], column: str, y_label: str) -> Chart | None:
    """One line per named history of `column` against the epoch; None without a value."""
    found = []
    for index, (name, history) in enumerate(histories.items()):
        points = tuple(
            Point(exact(epoch["epoch"]), exact(epoch[column]), f"{name}, epoch {epoch['epoch']}")
            for epoch in history
            if epoch.get(column) is not None
        )
        if points:
            found.append(Series(name, points, index, markers=len(points) <= 40))
    return make(key, title, "epoch", y_label, found, x_whole=True, fraction="accuracy" in column)


def training_charts(rows: Sequence[Row], details: Mapping[str, Any]) -> list[Chart]:
    """Training of the unpruned network, then fine-tuning at each ratio, one line per method (first seed), by validation accuracy."""
    result = []
    base = (details.get(DENSE) or {}).get("history") or []
    both = [
        pair
        for pair in (("training images", "train_accuracy"), ("validation images", "val_accuracy"))
        if any(e.get(pair[1]) is not None for e in base)
    ]
    lines = [history_chart("", "", {name: base}, column, "") for name, column in both]
    found = [
        Series(name, chart.series[0].points, index, markers=len(base) <= 40)
        for index, ((name, _), chart) in enumerate(zip(both, lines))
        if chart
    ]
    result.append(make("training_dense", "Training of the unpruned network", "epoch", "accuracy", found, x_whole=True, fraction=True))
    style = {name: index for index, name in enumerate(methods(rows))}
    for budget, ratio in sorted({(row["budget"], row["ratio"]) for row in rows if row["method"] != DENSE}):
        histories = {
            group.method: details.get(entry_name(group.rows[0]), {}).get("history") or []
            for group in groups(rows)
            if (group.budget, group.ratio) == (budget, ratio) and group.method != DENSE
        }
        column = (
            "val_accuracy"
            if any(epoch.get("val_accuracy") is not None for history in histories.values() for epoch in history)
            else "train_accuracy"
        )
        chart = history_chart(
            f"training_{budget}{ratio:g}",
            f"Fine-tuning at ratio {ratio:g} of {QUANTITIES.get(budget, budget)}",
            histories,
            column,
            f"{'validation' if column == 'val_accuracy' else 'training'} accuracy",
        )
        if chart:
            found = [Series(one.name, one.points, style[one.name], markers=one.markers) for one in chart.series]
            result.append(make(chart.key, chart.title, chart.x_label, chart.y_label, found, x_whole=True, fraction=True))
    return [chart for chart in result if chart is not None]


def _hollow(found: Sequence[Series]) -> str:
    return "Hollow markers: masked networks. " if any(one.hollow for one in found) else ""


def layer_sizes(detail: Mapping[str, Any]) -> tuple[list[tuple[str, Any, Any]], str]:
    """(layer, before, after) of a network's details, and whether these are its "width" or its "rank" (low rank: `ranks`)."""
    for key, what in (("widths", "width"), ("ranks", "rank")):
        if detail.get(key):
            return [(name, before, after) for name, (before, after) in detail[key].items()], what
    return [], "width"


def product(size: Any) -> float:
    """A width, or the product of several ranks of one layer."""
    return math.prod(size) if isinstance(size, (list, tuple)) else size


def size_text(size: Any) -> str:
    """A width, or several ranks of one layer as 16 x 32."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)


def exact(number: float) -> Value:
    """A value without a range."""
    return Value(number, number, number)
