"""Oracle: a table by hand; results that grow by what is missing."""

import json

from benchmarks._published import keep, known
from benchmarks.latency_budget import table

ROW = {"network": "resnet20", "method": "l1:measured", "target": 1.5}


def test_the_table_gives_medians_ranges_and_what_was_not_reached():
    found = [{**ROW, "repeat": n, "speedup": 1.4 + n / 10, "macs_removed": 0.3, "accuracy": 0.8 + n / 100, "accuracy_reconstructed": 0.9} for n in range(3)]
    found += [{**ROW, "method": "tp_l1", "repeat": 0, "speedup": 1.5, "macs_removed": 0.5, "accuracy": 0.85}, {**ROW, "method": "svd:global", "repeat": 0, "error": "too slow"}]
    assert table(found).splitlines()[4:] == [
        "| resnet20 | 1.5x | `tp_l1` | 1 | 1.50 | 50 | 85.00 |  |",
        "| resnet20 | 1.5x | `l1:measured` | 3 | 1.50 (1.40 - 1.60) | 30 (30 - 30) | 81.00 (80.00 - 82.00) | 90.00 (90.00 - 90.00) |",
        "| resnet20 | 1.5x | `svd:global` | 0 of 1 reached |  |  |  |  |"]


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    measured = []

    def measure(held):
        for number in range(3):
            if not known(held, {**ROW, "repeat": number}):
                measured.append(number)
                yield {**ROW, "repeat": number, "accuracy": number / 10}

    for _ in range(2):
        keep(tmp_path / "r.json", measure, lambda rows: f"{len(rows)} rows")
    assert measured == [0, 1, 2] and (tmp_path / "r.md").read_text() == "3 rows"
    assert [row["repeat"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [0, 1, 2]
