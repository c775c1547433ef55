"""The result files of a run folder: results.json and results.csv, each complete or not there at all.

A row is one network (a method at one ratio and seed, or the unpruned `dense` one); its keys are those of `COLUMNS`, masked rows add
`density` and `macs_nonzero`. `latency_ms` maps a batch size, as a string, to `{"median", "p10", "p90"}` in milliseconds; where the
networks were timed in turns also `speedup, speedup_p10, speedup_p90` over the unpruned one, and on a GPU `graph` with the same keys for
CUDA graph replay. The CSV holds the same rows flat: `latency_ms_<batch>_<statistic>`, an empty field for a value that was not measured,
and floats that parse back exactly.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, write_text

FORMAT = 1
COLUMNS = (
    "method",
    "budget",
    "ratio",
    "seed",
    "params",
    "params_removed",
    "macs",
    "macs_removed",
    "gflops",
    "accuracy_base",
    "accuracy_oneshot",
    "accuracy",
    "latency_ms",
    "seconds",
)
STATISTICS = ("median", "p10", "p90")

Row = Mapping[str, Any]


def entry_name(row: Row) -> str:
    """Name of the row's folder and of its details: `<method>-<budget><ratio>-s<seed>`, or `dense` for the unpruned network."""
    if row["method"] == "dense":
        return "dense"
    short = f"{row['ratio']:g}"
    # Two ratios that agree in six digits must not share a name.
    ratio = short if float(short) == row["ratio"] else repr(row["ratio"])
    return f"{row['method']}-{row['budget']}{ratio}-s{row.get('seed') or 0}"


def timings(rows: Sequence[Row]) -> list[str]:
    """Names of the latencies that any row has: `<batch>` as a program would run the network, `<batch>_graph` by CUDA graph replay."""
    names = {
        name
        for row in rows
        for batch, latency in (row.get("latency_ms") or {}).items()
        for name in (batch, *([f"{batch}_graph"] if "graph" in latency else []))
    }
    return sorted(names, key=lambda name: (int(name.partition("_")[0]), name))


def timing(row: Row, name: str) -> Row | None:
    """The row's latency of that name; None where it was not measured."""
    batch, _, mode = name.partition("_")
    latency = (row.get("latency_ms") or {}).get(batch)
    latency = latency.get(mode) if latency and mode else latency
    return latency if latency and latency.get("median") is not None else None


def timing_label(name: str) -> str:
    """The name in words: batch 1, or batch 1 (CUDA graph)."""
    batch, _, mode = name.partition("_")
    return f"batch\N{NO-BREAK SPACE}{batch}" + (" (CUDA graph)" if mode else "")


def columns(rows: Sequence[Row]) -> list[str]:
    """Column names of the flat table: the fixed ones, latencies by batch size, then further keys in order of appearance."""
    flat = list(dict.fromkeys(key for row in rows for key in flatten(row)))
    measured = [f"latency_ms_{name}_{statistic}" for name in timings(rows) for statistic in STATISTICS]
    latency = measured + [key for key in flat if key.startswith("latency_ms_") and key not in measured]
    fixed = [name for column in COLUMNS for name in (latency if column == "latency_ms" else [column])]
    return fixed + [key for key in flat if key not in fixed]


def flatten(row: Row) -> dict[str, Any]:
    """The row with `latency_ms` spread over `latency_ms_<batch>_<statistic>` keys."""
    flat = {key: value for key, value in row.items() if key != "latency_ms"}
    return flat | _spread("latency_ms", row.get("latency_ms") or {})


def write_results(folder: Path | str, rows: Sequence[Row], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write `folder`/results.json and results.csv and return what the JSON file holds.

    `meta` describes the run; `meta["details"]` may hold per-row details (see `compress.report.page`). A value that JSON has no number for
    (NaN, infinity) is written as null: not measured. Paths become strings.
    """
    folder = Path(folder)
    results = {"format": FORMAT, "rows": [_plain(row) for row in rows], "meta": _plain(meta)}
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns(results["rows"]), restval="", lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        writer.writerow({key: _cell(value) for key, value in flatten(row).items()})
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    write_text(folder / "results.json", text + "\n")
    write_text(folder / "results.csv", table.getvalue())
    return results


def read_results(folder: Path | str) -> dict[str, Any]:
    """What `write_results` wrote to `folder`. UserError: the file is missing, unreadable, or of another format."""
    path = Path(folder) / "results.json"
    results = read_json(path, "results file")
    if not isinstance(results, dict) or results.get("format") != FORMAT or not isinstance(results.get("rows"), list):
        raise UserError(f"the results file {path} is not of format {FORMAT}; run the experiment again with this version.")
    return results


def _spread(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in tree.items():
        flat |= _spread(f"{prefix}_{key}", item) if isinstance(item, Mapping) else {f"{prefix}_{key}": item}
    return flat


def _plain(value: Any) -> Any:
    """`value` in JSON's types: mappings with string keys, lists, numbers, strings, null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
