"""Figures of the conservation experiments, each with the CSV of its points: the published plots of Tanaka et al. 2020, figures 2 to 4.

* unit-conservation: what leaves a hidden unit against what enters it; conserved scores lie on the diagonal.
* layer-conservation: a layer's average score against the inverse of its size; conserved scores lie on a line through the origin.
* imp-conservation: the same with mean squared weights, before training and after the last epoch, and their course over the epochs.
* schedule-conservation: the largest score that one iteration removes, over the flow, against the number of iterations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.experiments import plots
from compress.experiments.base import write_csv

Rows = list[dict[str, Any]]
_PER_LAYER = 500


def write(experiment: str, rows: Rows, folder: Path) -> None:
    """Figures (of the first seed) and a flat CSV of all seeds where the results hold lists."""
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    {"unit-conservation": _units, "layer-conservation": _layers, "imp-conservation": _imp, "schedule-conservation": _schedules}[experiment](
        rows, first, folder
    )


def _units(rows: Rows, first: Rows, folder: Path) -> None:
    flat = [
        {"pruner": row["pruner"], "seed": row["seed"], "layer": layer, "unit": unit, "into": into, "out": out}
        for row in rows
        for layer, (sums_in, sums_out) in enumerate(row["units"])
        for unit, (into, out) in enumerate(zip(sums_in, sums_out, strict=True))
    ]
    write_csv(folder / "units.csv", flat)
    for row in first:
        series = {f"layer {index}": list(zip(*(sums[:_PER_LAYER] for sums in layer), strict=True)) for index, layer in enumerate(row["units"])}
        title = f"Unit conservation, {row['pruner']}: largest gap {row['largest_relative_gap']:.2g}"
        plots.lines(folder / "figures" / f"units-{row['pruner']}", series, title, "score into the unit", "score out of the unit", joined=False)


def _layers(rows: Rows, first: Rows, folder: Path) -> None:
    flat = [{"pruner": row["pruner"], "seed": row["seed"]} | layer for row in rows for layer in row["layers"]]
    write_csv(folder / "layers.csv", flat)
    for row in first:
        points = [(layer["inverse_size"], layer["average"]) for layer in row["layers"]]
        # A criterion whose scores may be negative (GraSP) has no logarithm.
        log = all(average > 0 for _, average in points)
        title = f"Layer conservation, {row['pruner']}"
        name, axes = folder / "figures" / f"layers-{row['pruner']}", ("1 / number of weights", "average score")
        plots.lines(name, {"layers": points}, title, *axes, log_x=True, log_y=log, joined=False)


def _imp(rows: Rows, first: Rows, folder: Path) -> None:
    flat = [
        {"seed": row["seed"], "layer": layer, "epoch": epoch, "mean_square": value, "inverse_size": row["inverse_size"][layer]}
        for row in rows
        for layer, course in row["mean_square"].items()
        for epoch, value in enumerate(course)
    ]
    write_csv(folder / "layers.csv", flat)
    row = first[0]
    points = {
        when: [(row["inverse_size"][layer], course[place]) for layer, course in row["mean_square"].items()]
        for when, place in (("before training", 0), ("after training", -1))
    }
    title = "Mean squared weight of each layer"
    plots.lines(
        folder / "figures" / "layers", points, title, "1 / number of weights", "mean squared weight", log_x=True, log_y=True, joined=False
    )
    courses = {layer: list(enumerate(course)) for layer, course in row["mean_square"].items()}
    plots.lines(folder / "figures" / "course", courses, f"{title} while training", "epoch", "mean squared weight", log_y=True)


def _schedules(rows: Rows, first: Rows, folder: Path) -> None:
    for pruner in dict.fromkeys(row["pruner"] for row in first):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in first:
            if row["pruner"] == pruner and row["compression_ratio"] > 1:
                label = f"{row['schedule']}, {row['compression_ratio']:g}x"
                series.setdefault(label, []).append((row["iterations"], row["largest_share"]))
        if series:
            title = f"Largest score removed at once, {pruner} (below 1: no layer collapses)"
            plots.lines(folder / "figures" / f"schedules-{pruner}", series, title, "iterations", "score removed / flow", log_x=True)
