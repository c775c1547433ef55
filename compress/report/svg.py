"""Charts as inline SVG: positions in the units of the view box, which the template turns into markup.

Nothing here holds text markup, so that every name passes the template's escaping. Colours are classes (`c0`..`c6`, `dense`), which the
style sheet sets for light and dark pages; markers differ by shape as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .chart import Chart, layer_sizes, product, size_text, tick_text, ticks
from .series import Point, Series, Value

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 50
COLOURS = 7
MARKER_SIZE = 5.0
LONGEST_LABEL = 22


def layout(chart: Chart) -> dict[str, Any]:
    """Everything that the template draws of `chart`, in view box units."""

    def x(number: float) -> float:
        return _scale(number, chart.x_limits, LEFT, WIDTH - RIGHT)

    def y(number: float) -> float:
        return _scale(number, chart.y_limits, HEIGHT - BOTTOM, TOP)

    drawn = []
    for one in chart.series:
        dots = [
            {"x": x(point.x.mean), "y": y(point.y.mean), "tip": tip(chart, one, point), "bars": _bars(point, x, y)} for point in one.points
        ]
        drawn.append(
            {
                "name": one.name,
                "colour": colour(one.style),
                "marker": marker(one.style),
                "hollow": one.hollow,
                "dots": dots,
                "markers": one.markers,
                "line": _path([(dot["x"], dot["y"]) for dot in dots]) if len(dots) > 1 else "",
                "level": y(one.points[0].y.mean) if one.style < 0 else None,
            }
        )
    return {
        "key": chart.key,
        "title": chart.title,
        "note": chart.note,
        "width": WIDTH,
        "height": HEIGHT,
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [{"at": x(tick), "text": tick_text(tick)} for tick in chart.x_ticks],
        "y_ticks": [{"at": y(tick), "text": tick_text(tick)} for tick in chart.y_ticks],
        "front": _path(_stairs([(x(point.x.mean), y(point.y.mean)) for point in chart.front])) if len(chart.front) > 1 else "",
        "series": drawn,
        "description": describe(chart),
    }


def bars(detail: Mapping[str, Any]) -> dict[str, Any] | None:
    """The width (or rank) of each layer before and after as a bar chart; None without details."""
    sizes, what = layer_sizes(detail)
    if not sizes:
        return None
    step = max(8.0, min(34.0, 700 / len(sizes)))
    width = LEFT + RIGHT + step * len(sizes)
    every = max(1, math.ceil(13 / step))
    labels = [name if len(name) <= LONGEST_LABEL else "\N{HORIZONTAL ELLIPSIS}" + name[1 - LONGEST_LABEL :] for name, _, _ in sizes]
    bottom = TOP + 200
    levels = ticks(0, max(product(before) for _, before, _ in sizes), 4)

    def y(number: float) -> float:
        return _scale(number, (0, levels[-1]), bottom, TOP)

    drawn = [
        {
            "x": round(LEFT + step * (index + 0.12), 1),
            "middle": round(LEFT + step * (index + 0.5), 1),
            "width": round(step * 0.76, 1),
            "before": y(product(before)),
            "after": y(product(after)),
            "label": labels[index] if index % every == 0 else "",
            "tip": f"{name}: {what} {size_text(before)} \N{RIGHTWARDS ARROW} {size_text(after)}",
        }
        for index, (name, before, after) in enumerate(sizes)
    ]
    kept = sum(product(after) for _, _, after in sizes) / max(sum(product(before) for _, before, _ in sizes), 1)
    return {
        "what": what,
        "width": round(max(width, WIDTH), 1),
        "height": bottom + 8 + 5.6 * max(map(len, labels)),
        "left": LEFT,
        "right": round(width - RIGHT, 1),
        "top": TOP,
        "bottom": bottom,
        "bars": drawn,
        "y_ticks": [{"at": y(level), "text": tick_text(level)} for level in levels],
        "description": f"{what} of {len(sizes)} layers before and after; {100 * kept:.1f} % of the sum is kept",
    }


def marker(style: int) -> str:
    """Path of the marker of a style around the origin; the dense network has a star, the others cycle through eight shapes."""
    r = MARKER_SIZE
    if style < 0:
        return _path(_regular(10, 1.5 * r, 0.62 * r), close=True)
    shapes = (
        f"M{-r} 0A{r} {r} 0 1 0 {r} 0A{r} {r} 0 1 0 {-r} 0Z",
        _path([(-r * 0.9, -r * 0.9), (r * 0.9, -r * 0.9), (r * 0.9, r * 0.9), (-r * 0.9, r * 0.9)], close=True),
        _path(_regular(3, 1.3 * r), close=True),
        _path(_regular(4, 1.3 * r), close=True),
        _path([(a, -b) for a, b in _regular(3, 1.3 * r)], close=True),
        _path(_plus(r), close=True),
        _path(_regular(5, 1.2 * r), close=True),
        _path(_turn(_plus(r)), close=True),
    )
    return shapes[style % len(shapes)]


def colour(style: int) -> str:
    """Class name of a style's colour."""
    return "dense" if style < 0 else f"c{style % COLOURS}"


def tip(chart: Chart, one: Series, point: Point) -> str:
    """What a reader sees when pointing at a point: its name and both values with their ranges."""
    if chart.names:
        return f"{one.name}: {point.label} ({point.y.mean:.1%} kept)"
    return f"{point.label}: {chart.y_label} {_quote(point.y)}, {chart.x_label.split(',')[0].split(' (')[0]} {_quote(point.x)}"


def describe(chart: Chart) -> str:
    """One sentence per chart for those who do not see it."""
    lines = [
        f"{one.name} from {one.points[0].y.mean:.4g} to {one.points[-1].y.mean:.4g}"
        if len(one.points) > 1
        else f"{one.name} {one.points[0].y.mean:.4g}"
        for one in chart.series
    ]
    return f"{chart.y_label} against {chart.x_label}: {'; '.join(lines)}."


def _quote(value: Value) -> str:
    text = f"{value.mean:.4g}"
    return text + (f" ({value.low:.4g} to {value.high:.4g})" if value.spread else "")


def _bars(point: Point, x: Any, y: Any) -> str:
    across = f"M{x(point.x.low)} {y(point.y.mean)}H{x(point.x.high)}" if point.x.spread else ""
    return across + (f"M{x(point.x.mean)} {y(point.y.low)}V{y(point.y.high)}" if point.y.spread else "")


def _scale(number: float, limits: tuple[float, float], start: float, end: float) -> float:
    return round(start + (number - limits[0]) / (limits[1] - limits[0]) * (end - start), 1)


def _path(points: Sequence[tuple[float, float]], close: bool = False) -> str:
    return "M" + "L".join(f"{a:.6g} {b:.6g}" for a, b in points) + ("Z" if close else "") if points else ""


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Between two points of the front the lower one holds until the next is affordable."""
    corners = [(later[0], earlier[1]) for earlier, later in zip(points, points[1:])]
    return [item for pair in zip(points, corners) for item in pair] + list(points[-1:])


def _regular(count: int, outer: float, inner: float | None = None) -> list[tuple[float, float]]:
    radii = [outer if index % 2 == 0 or inner is None else inner for index in range(count)]
    return [
        (radius * math.sin(2 * math.pi * index / count), -radius * math.cos(2 * math.pi * index / count))
        for index, radius in enumerate(radii)
    ]


def _plus(r: float) -> list[tuple[float, float]]:
    a, b = 0.4 * r, 1.2 * r
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def _turn(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    half = math.sqrt(0.5)
    return [(half * (a - b), half * (a + b)) for a, b in points]
