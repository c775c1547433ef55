"""Figures of the experiments, each with the CSV of its points beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from compress.experiments.base import write_csv

Points = Sequence[tuple[float, float]]


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Figure, columns: int = 5) -> None:
    """Below the axes, where it covers nothing."""
    found = figure.axes[0].get_legend_handles_labels()
    if found[0]:
        figure.legend(*found, loc="outside lower center", ncols=min(columns, len(found[0])), fontsize=8, frameon=False)


def _save(figure: Figure, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
    write_csv(path.with_suffix(".csv"), rows)


def lines(
    path: Path,
    series: Mapping[str, Points],
    title: str,
    x: str,
    y: str,
    marks: Sequence[float] = (),
    log_x: bool = False,
    log_y: bool = False,
    joined: bool = True,
) -> None:
    """One line with dots per series, or dots alone; `marks` are vertical lines (prunes)."""
    figure, axes = _axes(title, x, y)
    for name, points in series.items():
        style = {"marker": "o", "markersize": 3.5 if len(points) <= 40 else 1.5} | ({} if joined else {"linestyle": "none"})
        axes.plot(*zip(*points, strict=True), label=name, **style)
    for mark in marks:
        axes.axvline(mark, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    if log_x:
        axes.set_xscale("log")
        values = sorted({x for points in series.values() for x, _ in points})
        if len(values) <= 10 and all(len(f"{value:g}") <= 5 for value in values):
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
    if log_y:
        axes.set_yscale("log")
    _legend(figure)
    _save(figure, path, [{"series": name, x: a, y: b} for name, points in series.items() for a, b in points])


def error_bars(path: Path, series: Mapping[str, Sequence[tuple[float, float, float, float]]], title: str, x: str, y: str) -> None:
    """One line per series of (x, mean, low, high), with asymmetric bars from low to high."""
    figure, axes = _axes(title, x, y)
    for name, points in series.items():
        xs, means, lows, highs = (list(values) for values in zip(*points, strict=True))
        below = [m - low for m, low in zip(means, lows, strict=True)]
        above = [high - m for m, high in zip(means, highs, strict=True)]
        axes.errorbar(xs, means, yerr=[below, above], marker="o", markersize=3.5, capsize=3, label=name)
    _legend(figure)
    _save(figure, path, [{"series": n, x: a, "mean": m, "low": lo, "high": hi} for n, points in series.items() for a, m, lo, hi in points])


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], title: str, x: str, y: str) -> None:
    """Grouped bars: group -> series -> value."""
    figure, axes = _axes(title, x, y)
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        at = [index + (place - (len(names) - 1) / 2) * width for index, values in enumerate(groups.values()) if name in values]
        axes.bar(at, [values[name] for values in groups.values() if name in values], width, label=name)
    axes.set_xticks(range(len(groups)), list(groups), rotation=45 if len(groups) > 6 else 0, fontsize=7 if len(groups) > 6 else 9)
    heights = [value for values in groups.values() for value in values.values()]
    if heights and min(heights) > 0.5 * max(heights):
        axes.set_ylim(bottom=min(heights) - 0.2 * (max(heights) - min(heights)) - 1e-3)
    _legend(figure)
    _save(figure, path, [{x: group, "series": name, y: value} for group, values in groups.items() for name, value in values.items()])


def histograms(path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[int]]]], title: str) -> None:
    """One panel per layer with one outline per series: (bin edges [n + 1], counts [n]) of its kept weights."""
    columns = min(4, len(panels))
    figure = Figure(figsize=(3 * columns, 2.2 * -(-len(panels) // columns) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    rows = []
    for index, (layer, series) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, index + 1)
        for name, (edges, counts) in series.items():
            axes.stairs(counts, edges, label=name)
            found = zip(edges[:-1], edges[1:], counts, strict=True)
            rows += [{"layer": layer, "series": name, "low": low, "high": high, "count": n} for low, high, n in found]
        axes.set_title(layer, fontsize=7)
        axes.tick_params(labelsize=6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path, rows)
