"""The tables of the report as cells: the text that is shown and the exact value that it stands for and is sorted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chart import layer_sizes, product, size_text
from .results import Row, entry_name, timing_label, timings
from .series import DENSE, Group, delta, groups, methods, speedup, value
from .summary import count, percent, rounded, signed

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column's key, its head, and a longer description."""

    key: str
    head: str
    help: str = ""


@dataclass(frozen=True)
class Cell:
    """`value` is the exact number (None: not known), `note` a second line, `mark` good, bad or best."""

    key: str
    text: str
    value: float | str | None = None
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """`top` are rows that stay above the sorted ones."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    top: tuple[tuple[Cell, ...], ...] = ()


def method_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per method with one line per row of the results, the dense network above."""
    dense = [row for row in rows if row["method"] == DENSE]
    result = []
    for name in methods(rows) or ([DENSE] if dense else []):
        chosen = [row for group in groups(rows) if group.method == name for row in group.rows]
        above = dense if name != DENSE else []
        heads = _columns(chosen, timings(rows))
        result.append(
            Table(name, heads, tuple(_line(row, heads, dense) for row in chosen), tuple(_line(row, heads, dense) for row in above))
        )
    return result


def overview(rows: Sequence[Row]) -> list[Table]:
    """Per budget the accuracy of each method (lines) at each ratio (columns), mean and range over seeds; the best of a ratio is marked."""
    pruned = [group for group in groups(rows) if group.method != DENSE]
    result = []
    for budget in dict.fromkeys(group.budget for group in pruned):
        cells = {(group.method, group.ratio): (group, value(group.rows, "accuracy")) for group in pruned if group.budget == budget}
        ratios = sorted({ratio for _, ratio in cells})
        best = {
            ratio: max((accuracy.mean for (_, other), (_, accuracy) in cells.items() if other == ratio and accuracy), default=None)
            for ratio in ratios
        }
        lines = []
        for name in dict.fromkeys(method for method, _ in cells):
            line = [Cell("method", name, name)]
            for ratio in ratios:
                group, accuracy = cells.get((name, ratio), (None, None))
                mark = (
                    "best"
                    if accuracy and accuracy.mean == best[ratio] and len({method for method, other in cells if other == ratio}) > 1
                    else ""
                )
                line.append(_accuracy(f"{ratio:g}", group, mark))
            lines.append(tuple(line))
        result.append(
            Table(budget, (Column("method", "method"), *(Column(f"{ratio:g}", f"ratio {ratio:g}") for ratio in ratios)), tuple(lines))
        )
    return result


def layer_table(rows: Sequence[Row], details: Mapping[str, Any]) -> Table | None:
    """Layers (lines) by networks (columns): what is left of each layer's width or rank; None without details."""
    entries = {entry_name(row): layer_sizes(details.get(entry_name(row)) or {})[0] for row in rows if row["method"] != DENSE}
    entries = {name: {layer: (before, after) for layer, before, after in sizes} for name, sizes in entries.items() if sizes}
    if not entries:
        return None
    before = {layer: size for sizes in entries.values() for layer, (size, _) in sizes.items()}
    heads = (Column("number", "#"), Column("layer", "layer"), Column("before", "before"), *(Column(name, name) for name in entries))
    lines = []
    for number, (layer, size) in enumerate(before.items(), 1):
        kept = [
            Cell(name, size_text(sizes[layer][1]), product(sizes[layer][1])) if layer in sizes else Cell(name, NOTHING)
            for name, sizes in entries.items()
        ]
        lines.append(
            (Cell("number", str(number), number), Cell("layer", layer, layer), Cell("before", size_text(size), product(size)), *kept)
        )
    return Table("layers", heads, tuple(lines))


def _accuracy(key: str, group: Group | None, mark: str) -> Cell:
    accuracy, base = (value(group.rows, name) if group else None for name in ("accuracy", "accuracy_base"))
    if accuracy is None:
        return Cell(key, NOTHING)
    note = signed(accuracy.mean - base.mean, 4) if base else ""
    if accuracy.count > 1:
        note += f"\n{accuracy.low:.4f}\N{EN DASH}{accuracy.high:.4f}"
    return Cell(key, f"{accuracy.mean:.4f}", accuracy.mean, note, mark)


def _columns(rows: Sequence[Row], timed: Sequence[str]) -> tuple[Column, ...]:
    found = [Column("ratio", "ratio", "fraction removed of the budget")]
    if len({row["budget"] for row in rows}) > 1:
        found.insert(0, Column("budget", "budget", "quantity that the ratio is taken of"))
    if len({row.get("seed") for row in rows}) > 1:
        found.append(Column("seed", "seed"))
    found += [
        Column("accuracy", "accuracy", "test accuracy after fine-tuning"),
        Column("delta", "difference", "accuracy minus the accuracy of the unpruned network"),
        Column("macs_removed", "MACs removed", "share of the MACs removed"),
        Column("params_removed", "parameters removed", "share of the parameters removed"),
    ]
    if any(row.get("density") is not None for row in rows):
        found += [
            Column("density", "density", "fraction of non-zero weights"),
            Column("macs_nonzero", "non-zero MACs", "MACs with non-zero weights"),
        ]
    for name in timed:
        found += [
            Column(
                f"speedup_{name}",
                f"speed\N{NON-BREAKING HYPHEN}up, {timing_label(name)}",
                "time of the unpruned network / time of this one (p10 to p90)",
            ),
            Column(f"latency_ms_{name}", f"ms, {timing_label(name)}", "median latency of one forward pass (p10 to p90)"),
        ]
    memory = [
        Column(key, head, help)
        for key, head, help in (
            ("peak_memory_bytes", "peak MiB", "peak memory of one forward pass at the largest batch"),
            ("activation_bytes", "activation MiB", "activations of one image"),
        )
        if any(row.get(key) is not None for row in rows)
    ]
    return (
        *found,
        Column("gflops", "GFLOPs", "1e9 floating point operations per image, 2 per MAC"),
        Column("params", "parameters"),
        Column("accuracy_oneshot", "one-shot accuracy", "test accuracy after surgery and recalibration, before fine-tuning"),
        *memory,
        Column("seconds", "seconds", "time that this network took to make"),
    )


def _line(row: Row, heads: Sequence[Column], dense: Sequence[Row]) -> tuple[Cell, ...]:
    return tuple(_cell(row, column.key, dense) for column in heads)


def _cell(row: Row, key: str, dense: Sequence[Row]) -> Cell:
    if key == "ratio" and row["method"] == DENSE:
        return Cell(key, "dense", 0)
    if key == "delta":
        number = None if row["method"] == DENSE else delta(row)
        return Cell(key, NOTHING) if number is None else Cell(key, signed(number, 4), number)
    if key.startswith("latency_ms_"):
        latency = value([row], f"latency:{key.removeprefix('latency_ms_')}")
        return (
            Cell(key, NOTHING)
            if latency is None
            else Cell(key, rounded(latency.mean), latency.mean, f"{rounded(latency.low)}\N{EN DASH}{rounded(latency.high)}")
        )
    if key.startswith("speedup_"):
        return _speed(row, key, dense)
    number = row.get(key)
    if number is None:
        return Cell(key, NOTHING)
    if key in ("params", "macs_nonzero"):
        return Cell(key, count(number), number)
    if key.endswith("_bytes"):
        return Cell(key, rounded(number / 2**20), number)
    if key.endswith("_removed"):
        return Cell(key, percent(number), number)
    if key.startswith("accuracy"):
        return Cell(key, f"{number:.4f}", number)
    if key in ("gflops", "seconds"):
        return Cell(key, rounded(number), number)
    return Cell(key, number if isinstance(number, str) else f"{number:.4g}" if key != "seed" else str(number), number)


def _speed(row: Row, key: str, dense: Sequence[Row]) -> Cell:
    gain = None if row["method"] == DENSE else speedup(dense, [row], key.removeprefix("speedup_"))
    if gain is None:
        return Cell(key, NOTHING)
    note = f"{gain.low:.2f}\N{EN DASH}{gain.high:.2f}"
    mark = ""
    if gain.high < 1:
        note, mark = f"slower than dense\n{note}", "bad"
    elif gain.low <= 1:
        note, mark = f"{'slower, ' if gain.mean < 1 else ''}within the spread\n{note}", "doubt"
    return Cell(key, f"{gain.mean:.2f}\N{MULTIPLICATION SIGN}", gain.mean, note, mark)
