"""The result files of a run folder: results.json and results.csv, each complete or not there at all.

A row is one network (a method at one ratio and seed, or the unpruned `dense` one); its keys are those of `COLUMNS`, masked rows add
`density` and `macs_nonzero`. `latency_ms` maps a batch size, as a string, to `{"median", "p10", "p90"}` in milliseconds. The CSV holds the
same rows flat: `latency_ms_<batch>_<statistic>`, an empty field for a value that was not measured, and floats that parse back exactly.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

FORMAT = 1
COLUMNS = ("method", "budget", "ratio", "seed", "params", "params_removed", "macs", "macs_removed", "gflops",
           "accuracy_base", "accuracy_oneshot", "accuracy", "latency_ms", "seconds")
STATISTICS = ("median", "p10", "p90")

Row = Mapping[str, Any]


def entry_name(row: Row) -> str:
    """Name of the row's folder and of its details: `<method>-<budget><ratio>-s<seed>`, or `dense` for the unpruned network."""
    if row["method"] == "dense":
        return "dense"
    return f"{row['method']}-{row['budget']}{row['ratio']:g}-s{row.get('seed') or 0}"


def batch_sizes(rows: Sequence[Row]) -> list[int]:
    """Batch sizes that a latency was measured at in any row, ascending."""
    return sorted({int(batch) for row in rows for batch in row.get("latency_ms") or {}})


def columns(rows: Sequence[Row]) -> list[str]:
    """Column names of the flat table: the fixed ones, latencies by batch size, then further keys in order of appearance."""
    latency = [f"latency_ms_{batch}_{statistic}" for batch in batch_sizes(rows) for statistic in STATISTICS]
    fixed = [name for column in COLUMNS for name in (latency if column == "latency_ms" else [column])]
    return fixed + list(dict.fromkeys(key for row in rows for key in row if key not in COLUMNS))


def flatten(row: Row) -> dict[str, Any]:
    """The row with `latency_ms` spread over `latency_ms_<batch>_<statistic>` keys."""
    flat = {key: value for key, value in row.items() if key != "latency_ms"}
    for batch, latency in (row.get("latency_ms") or {}).items():
        flat |= {f"latency_ms_{batch}_{statistic}": latency.get(statistic) for statistic in STATISTICS}
    return flat


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
    write_atomically(folder / "results.json", (text + "\n").encode())
    write_atomically(folder / "results.csv", table.getvalue().encode())
    return results


def read_results(folder: Path | str) -> dict[str, Any]:
    """What `write_results` wrote to `folder`. UserError: the file is missing, unreadable, or of another format."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the results file {path} cannot be read ({error}); run the experiment again.") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or not isinstance(results.get("rows"), list):
        raise UserError(f"the results file {path} is not of format {FORMAT}; run the experiment again with this version.")
    return results


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: after a crash at any moment the old file or the new one is there, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; what a run writes is as readable as any other new file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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
