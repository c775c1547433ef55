"""Charts as PNG files: the same charts, limits and ticks as in the page, drawn by matplotlib without its global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .chart import Chart, tick_text
from .series import DENSE

# Okabe and Ito's colours, which stay apart under the common colour vision deficiencies, with a wine red for their yellow and black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "p", "X")
INK, GRID, FRONT = "#1f2430", "#e3e6ec", "#b4bac6"


def draw(chart: Chart) -> Figure:
    """The chart as a figure with one axes; each series is one error bar container, in the chart's order."""
    figure = Figure(figsize=(6.4, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    if len(chart.front) > 1:
        axes.step(
            [point.x.mean for point in chart.front],
            [point.y.mean for point in chart.front],
            where="post",
            color=FRONT,
            linewidth=4,
            alpha=0.5,
            zorder=1,
        )
    for one in chart.series:
        dense = one.style < 0
        colour = INK if dense else PALETTE[one.style % len(PALETTE)]
        x, y = [point.x for point in one.points], [point.y for point in one.points]
        spread = {
            f"{axis}err": ([value.mean - value.low for value in values], [value.high - value.mean for value in values])
            for axis, values in (("x", x), ("y", y))
            if any(value.spread for value in values)
        }
        axes.errorbar(
            [value.mean for value in x],
            [value.mean for value in y],
            **spread,
            label=one.name + (" (masked)" if one.hollow else ""),
            color=colour,
            elinewidth=1,
            linewidth=1.6,
            linestyle="-" if len(x) > 1 else "none",
            marker=("*" if dense else MARKERS[one.style % len(MARKERS)]) if one.markers else "",
            markersize=12 if dense else 6,
            clip_on=False,
            markerfacecolor="white" if one.hollow else colour,
            markeredgecolor=colour,
        )
        if dense and chart.series[0] is not one:
            axes.axhline(y[0].mean, color=INK, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0.9)
    axes.set(xlim=chart.x_limits, ylim=chart.y_limits, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_xticks(chart.x_ticks, [tick_text(tick) for tick in chart.x_ticks])
    axes.set_yticks(chart.y_ticks, [tick_text(tick) for tick in chart.y_ticks])
    axes.set_title(chart.title, loc="left", pad=12, fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    names = [one.name for one in chart.series]
    if names != [DENSE]:
        _legend(figure, len(names))
    return figure


def _legend(figure: Figure, count: int) -> None:
    """The legend below the axes, in as many columns (at most 4) as the figure is wide enough for."""
    for columns in range(min(count, 4), 0, -1):
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            return
        legend.remove()


def png(chart: Chart) -> bytes:
    """The chart as a PNG file of 1024 x 704 pixels; the same chart gives the same bytes."""
    buffer = io.BytesIO()
    draw(chart).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def histograms_png(title: str, panels: Sequence[Mapping[str, Any]], columns: int = 6) -> bytes:
    """Small multiples of `compress.report.masks.panels` as a PNG file: before pruning grey, kept weights blue, each to its own height.

    All panels share one axes, so that networks of a hundred layers are drawn in a second.
    """
    columns = min(columns, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(0.4 + 1.6 * columns, 0.7 + 1.05 * rows), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.0, 0.96, 1 - 0.55 / (0.7 + 1.05 * rows)))
    axes.set(xlim=(0, columns * 1.15 - 0.15), ylim=(rows * 1.75, 0), xticks=[], yticks=[])
    axes.set_axis_off()
    for index, panel in enumerate(panels):
        x, y = (index % columns) * 1.15, (index // columns) * 1.75
        for key, face, edge, alpha in (("before", "#9aa3b2", "none", 0.45), ("after", PALETTE[0], PALETTE[0], 0.4)):
            points = corners(panel["counts"][key])
            if points:
                axes.fill([x + a for a, _ in points], [y + b for _, b in points], facecolor=face, edgecolor=edge, alpha=alpha, linewidth=0.8)
        axes.plot([x, x + 1], [y + 1, y + 1], color=INK, linewidth=0.8)
        zero = x + panel["origin"]
        axes.plot([zero, zero], [y, y + 1], color=INK, linewidth=0.5, linestyle=(0, (2, 3)))
        name = panel["name"] if len(panel["name"]) <= 26 else "\N{HORIZONTAL ELLIPSIS}" + panel["name"][-25:]
        style = {"fontsize": 6, "color": INK, "parse_math": False}
        axes.text(x, y + 1.2, panel["low"], **style)
        axes.text(x + 1, y + 1.2, panel["high"], ha="right", **style)
        axes.text(x + 0.5, y + 1.45, name, ha="center", **style)
    figure.suptitle(f"{title}: before (grey) and kept (blue)", fontsize=9, fontweight="bold", color=INK, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def corners(counts: Sequence[int]) -> list[tuple[float, float]]:
    """The outline of a histogram in a box of 1 x 1 with y downwards, the highest bin as high as the box; empty without counts."""
    top, step = max(counts, default=0), 1 / max(len(counts), 1)
    if not top:
        return []
    bars = [((index + side) * step, 1 - number / top) for index, number in enumerate(counts) for side in (0, 1)]
    return [(0.0, 1.0), *bars, (1.0, 1.0)]
