"""Tables and figures of pruning at initialisation: accuracy, test time and MACs by compression ratio, and what happened to each layer."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from compress.experiments import plots
from compress.experiments.base import write_csv
from compress.files import write_text

Rows = list[dict[str, Any]]
QUANTITIES = {
    "accuracy": ("Test accuracy", "{:.4f}"),
    "test_seconds": ("Test time in seconds, masks running dense", "{:.3f}"),
    "flops": ("FLOPs of the masked network (one image)", "{:,.0f}"),
    "mac_fraction": ("FLOPs of the masked over those of the dense network", "{:.4f}"),
}


def _label(row: dict[str, Any]) -> str:
    return row["pruner"] if row.get("levels") is None else f"{row['pruner']} x{row['levels']}"


def _mean(rows: Rows, label: str, ratio: float, key: str) -> float | None:
    found = [row[key] for row in rows if _label(row) == label and row["compression_ratio"] == ratio]
    return statistics.fmean(found) if found else None


def table(rows: Rows, key: str, form: str) -> str:
    """Markdown: one line per compression ratio, one column per criterion, means over seeds."""
    labels = list(dict.fromkeys(_label(row) for row in rows))
    ratios = list(dict.fromkeys(row["compression_ratio"] for row in rows))
    lines = ["| compression | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for ratio in ratios:
        cells = [_mean(rows, label, ratio, key) for label in labels]
        lines.append(f"| {ratio:g}x | " + " | ".join("" if cell is None else form.format(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: Rows, folder: Path, detail_ratio: float) -> None:
    """`tables.md`, the three curves, and for `detail_ratio` the layers' densities, MACs and weight histograms (first seed)."""
    parts = []
    for key, (title, form) in QUANTITIES.items():
        parts.append(f"## {title}\n\n{table(rows, key, form)}")
        series: dict[str, list[tuple[float, float]]] = {}
        for label in dict.fromkeys(_label(row) for row in rows):
            ratios = sorted({row["compression_ratio"] for row in rows if _label(row) == label})
            series[label] = [(ratio, _mean(rows, label, ratio, key)) for ratio in ratios]
        plots.lines(folder / "figures" / key, series, title, "compression ratio", key, log_x=True)
    structure = [
        f"| {_label(r)} | {r['compression_ratio']:g}x | {r['seed']} | {r['density']:.6f} | {r['effective_density']:.6f} | "
        f"{r['empty_layers']} | {r['dead_channels']} |"
        for r in rows
    ]
    head = (
        "| criterion | compression | seed | density | effective density | empty layers | dead channels |\n|---|---|---|---|---|---|---|\n"
    )
    parts.append("## What is left\n\n" + head + "\n".join(structure) + "\n")
    write_text(folder / "tables.md", "\n".join(parts))
    seed = rows[0]["seed"]
    detail = [row for row in rows if row["seed"] == seed and abs(row["compression_ratio"] / detail_ratio - 1) < 1e-6]
    if detail:
        _layers(detail, folder, detail_ratio)


def _layers(rows: Rows, folder: Path, ratio: float) -> None:
    density: dict[str, dict[str, float]] = {}
    macs: dict[str, dict[str, float]] = {}
    flat = []
    for row in rows:
        for layer in row["structure"]["layers"]:
            density.setdefault(layer["name"], {})[_label(row)] = 1 - layer["density"]
            macs.setdefault(layer["name"], {})[_label(row)] = layer["macs_nonzero"]
            flat.append({"pruner": _label(row), "layer": layer["name"], "sparsity": 1 - layer["density"]} | layer)
        panels: dict[str, dict[str, tuple[list, list]]] = {}
        for when, layers in row["histograms"].items():
            for name, panel in layers.items():
                panels.setdefault(name, {})[when] = (panel["edges"], panel["counts"])
        plots.histograms(folder / "figures" / f"weights-{_label(row)}", panels, f"Kept weights at {ratio:g}x, {_label(row)}")
    plots.bars(folder / "figures" / "layer_sparsity", density, f"Sparsity of each layer at {ratio:g}x", "layer", "sparsity")
    plots.bars(folder / "figures" / "layer_macs", macs, f"MACs of each layer at {ratio:g}x", "layer", "MACs")
    write_csv(folder / "layers.csv", flat)
