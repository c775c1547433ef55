"""What the report says about masked networks: nominal and effective compression, layers, histograms of weights.

It reads `details[entry]["mask"]`, which holds the counts of `compress.effective.report` (weights, kept, effective, macs, macs_nonzero,
empty_layers, dead_channels, and the same per layer under `layers`) and `histograms` {layer: {low, high, before, after}}. A kept weight
that lies on no path from input to output is not effective; compression = weights / kept, effective compression = weights / effective.
FLOPs are 2 per MAC, those of the masked network count products with kept weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import Chart, exact, make
from .results import Row, entry_name
from .series import QUANTITIES, Point, Series, groups, methods
from .summary import count, percent
from .tables import NOTHING, Cell, Column, Table

HISTOGRAM = (160.0, 56.0)
LOST = 0.9


def masked(rows: Sequence[Row], details: Mapping[str, Any]) -> dict[str, tuple[Row, Mapping[str, Any]]]:
    """Entry name -> (row, its mask's details) of the networks that have any."""
    found = {entry_name(row): (row, (details.get(entry_name(row)) or {}).get("mask")) for row in rows}
    return {name: (row, mask) for name, (row, mask) in found.items() if mask}


def density_charts(rows: Sequence[Row], details: Mapping[str, Any]) -> list[Chart]:
    """Per method the density of every masked layer, one line per ratio of the method's first seed."""
    found, result = masked(rows, details), []
    for method in methods(rows):
        lines, names = [], ()
        for index, group in enumerate(group for group in groups(rows) if group.method == method):
            if entry_name(group.rows[0]) not in found:
                continue
            layers = found[entry_name(group.rows[0])][1]["layers"]
            names = tuple(layer["name"] for layer in layers)
            points = tuple(
                Point(exact(place), exact(layer["density"]), f"{layer['name']}: {layer['kept']:,} of {layer['weights']:,} weights")
                for place, layer in enumerate(layers, 1)
            )
            label = f"ratio {group.ratio:g} of {QUANTITIES.get(group.budget, group.budget)}"
            lines.append(Series(label, points, index, markers=len(points) <= 40))
        chart = make(
            f"density_{method}", f"Density per layer, {method}", "masked layer, from input to output", "kept fraction of the weights",
            lines, x_whole=True, y_zero=True, fraction=True, names=names,
        )  # fmt: skip
        result += [chart] if chart else []
    return result


def mask_table(rows: Sequence[Row], details: Mapping[str, Any]) -> Table | None:
    """One line per masked network; None without one."""
    found = masked(rows, details)
    if not found:
        return None
    heads = (
        Column("network", "network"),
        Column("kept", "kept weights", "weights under masks that are kept"),
        Column("density", "density", "kept / all weights under masks"),
        Column("compression", "compression", "all / kept weights"),
        Column("effective", "effective compression", "all / effective weights, those on a path from input to output"),
        Column("empty", "empty layers", "masked layers without a weight"),
        Column("dead", "dead channels", "output channels without an effective weight"),
        Column("flops", "FLOPs of the masked network", "2 per product with a kept weight, layers without masks included"),
        Column("flop_share", "of the dense FLOPs"),
    )
    return Table("masks", heads, tuple(_mask_line(name, mask) for name, (_, mask) in found.items()))


def _mask_line(name: str, mask: Mapping[str, Any]) -> tuple[Cell, ...]:
    empty, channels = list(mask["empty_layers"]), sum(layer["channels"] for layer in mask["layers"] if len(layer["shape"]) > 1)
    lost = mask["effective"] < LOST * mask["kept"]
    ineffective = mask["kept"] - mask["effective"]
    more = [f"and {len(empty) - 3} more"] if len(empty) > 3 else []
    flops, share = 2 * mask["macs_nonzero"], mask["macs_nonzero"] / max(mask["macs"], 1)
    return (
        Cell("network", name, name),
        Cell("kept", f"{mask['kept']:,}", mask["kept"], f"of {mask['weights']:,}"),
        Cell("density", f"{mask['density']:.4g}", mask["density"]),
        Cell("compression", times(mask["compression_ratio"]), mask["compression_ratio"]),
        Cell(
            "effective",
            times(mask["effective_compression_ratio"]),
            mask["effective_compression_ratio"],
            f"{ineffective:,} kept without effect" if ineffective else "",
            "bad" if lost else "",
        ),
        Cell("empty", str(len(empty)), len(empty), "\n".join(empty[:3] + more), "bad" if empty else ""),
        Cell("dead", str(mask["dead_channels"]), mask["dead_channels"], f"of {channels:,}"),
        Cell("flops", count(flops), flops),
        Cell("flop_share", percent(share), share),
    )


def times(ratio: float | None) -> str:
    """A compression as 10.0 with a multiplication sign; the infinity sign where nothing is left."""
    return "\N{INFINITY}" if ratio is None else f"{ratio:,.{2 if ratio < 100 else 0}f}\N{MULTIPLICATION SIGN}"


def layer_table(name: str, mask: Mapping[str, Any]) -> Table:
    """One line per masked layer of one network."""
    heads = (
        Column("number", "#"),
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("kept", "kept"),
        Column("density", "density"),
        Column("effective", "effective", "kept weights on a path from input to output"),
        Column("dead", "dead channels"),
        Column("flops", "FLOPs", "2 per MAC of the dense layer"),
        Column("flops_nonzero", "FLOPs, masked", "2 per product with a kept weight"),
    )
    lines = []
    for number, layer in enumerate(mask["layers"], 1):
        vector = len(layer["shape"]) == 1
        number_dead = layer["dead_channels"]
        dead = Cell("dead", NOTHING) if vector else Cell("dead", str(number_dead), number_dead, f"of {layer['channels']}")
        flops = (2 * layer["macs"], 2 * layer["macs_nonzero"])
        lines.append(
            (
                Cell("number", str(number), number),
                Cell("layer", layer["name"], layer["name"]),
                Cell("shape", "\N{MULTIPLICATION SIGN}".join(map(str, layer["shape"])), layer["weights"]),
                Cell("kept", f"{layer['kept']:,}", layer["kept"], mark="" if layer["kept"] else "bad"),
                Cell("density", f"{layer['density']:.4f}", layer["density"]),
                Cell("effective", f"{layer['effective']:,}", layer["effective"]),
                dead,
                *(
                    Cell(key, count(value) if value or not vector else NOTHING, value)
                    for key, value in zip(("flops", "flops_nonzero"), flops, strict=True)
                ),
            )
        )
    return Table(name, heads, tuple(lines))


def panels(mask: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One small histogram per layer: its counts, their outlines in a box of `HISTOGRAM`, each scaled to its own highest bin, the place of
    zero in that box (`origin`: its fraction), and the range as text."""
    layers = {layer["name"]: layer for layer in mask["layers"]}
    result = []
    for name, found in (mask.get("histograms") or {}).items():
        layer = layers[name]
        origin = min(1.0, max(0.0, -found["low"] / (found["high"] - found["low"])))
        result.append(
            {
                "name": name,
                "counts": {when: found[when] for when in ("before", "after")},
                "before": outline(found["before"]),
                "after": outline(found["after"]),
                "origin": origin,
                "zero": round(HISTOGRAM[0] * origin, 1),
                "low": short(found["low"]),
                "high": short(found["high"]),
                "text": f"{layer['kept']:,} of {layer['weights']:,} weights kept" if layer["kept"] else "no weight kept",
            }
        )
    return result


def outline(counts: Sequence[int]) -> str:
    """Closed path around the bars of a histogram, the highest one as high as the box; empty without counts."""
    top = max(counts, default=0)
    if not top:
        return ""
    width, height = HISTOGRAM
    step = width / len(counts)
    corners = "".join(f"V{height * (1 - number / top):.4g}H{(index + 1) * step:.4g}" for index, number in enumerate(counts))
    return f"M0 {height:g}{corners}V{height:g}Z"


def short(number: float) -> str:
    """A weight in three digits with a proper minus sign."""
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")


def warnings(rows: Sequence[Row], details: Mapping[str, Any]) -> list[str]:
    """Sentences on networks that masks have cut, and on kept weights that have no effect."""
    cut, lost = [], []
    for name, (_, mask) in masked(rows, details).items():
        empty = list(mask["empty_layers"])
        if empty:
            cut.append(f"{name} ({len(empty)} of {len(mask['layers'])})")
        elif mask["effective"] < LOST * mask["kept"]:
            nominal, effective = times(mask["compression_ratio"]), times(mask["effective_compression_ratio"])
            lost.append(f"{name} ({nominal} nominal, {effective} effective)")
    sentences = [f"Masks emptied whole layers of {', '.join(cut)}."] if cut else []
    return sentences + ([f"More than a tenth of the kept weights lie on no path to the output: {', '.join(lost)}."] if lost else [])
