"""Oracle: the rows themselves, and the csv and json modules of the standard library."""

import csv
import json

import numpy as np
import pytest

from compress.errors import UserError
from compress.report import entry_name, read_results, write_results
from compress.report.results import STATISTICS, timings

from .example import example


def parse(text):
    """A CSV field as the value it came from."""
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


@pytest.mark.parametrize("methods", [("l1",), ("l1", "mask_snip", "svd")])
def test_csv_holds_every_value_of_the_json(tmp_path, methods):
    rows, meta = example(methods=methods, ratios=(0.5, 0.9), seeds=(0, 1))
    rows[1]["accuracy"] = None
    write_results(tmp_path, rows, meta)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == {"format": 1, "rows": rows, "meta": meta}
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        expected = {key: value for key, value in row.items() if key != "latency_ms"}
        expected |= {f"latency_ms_{batch}_{name}": row["latency_ms"][batch][name] for batch in ("1", "64") for name in STATISTICS}
        found = {key: parse(text) for key, text in line.items()}
        assert {key: found.pop(key) for key in expected} == expected
        assert set(found.values()) <= {None}


def test_columns_follow_the_documented_order(tmp_path):
    write_results(tmp_path, *example(methods=("mask_snip",), ratios=(0.5,)))
    head = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert head == (
        "method,budget,ratio,seed,params,params_removed,macs,macs_removed,gflops,accuracy_base,accuracy_oneshot,accuracy,latency_ms_1_median,latency_ms_1_p10,"
        "latency_ms_1_p90,latency_ms_64_median,latency_ms_64_p10,latency_ms_64_p90,seconds,density,macs_nonzero"
    )


def test_numbers_that_json_has_no_word_for_become_null_and_numpy_becomes_plain(tmp_path):
    row = {"method": "l1", "budget": "macs", "ratio": 0.5, "params": np.int64(7), "accuracy": float("nan"), "seconds": np.float64(1.5)}
    assert write_results(tmp_path, [row], {"root": tmp_path, "size": (8, 8)})["rows"][0]["accuracy"] is None
    stored = read_results(tmp_path)
    assert stored["rows"] == [{"method": "l1", "budget": "macs", "ratio": 0.5, "params": 7, "accuracy": None, "seconds": 1.5}]
    assert stored["meta"] == {"root": str(tmp_path), "size": [8, 8]}


def test_entry_names():
    assert entry_name({"method": "l1", "budget": "macs", "ratio": 0.5, "seed": 3}) == "l1-macs0.5-s3"
    assert entry_name({"method": "dense", "budget": "params", "ratio": 0, "seed": 0}) == "dense"


def test_nested_latencies_are_flat_in_the_csv(tmp_path):
    rows, meta = example(methods=("l1",), ratios=(0.5,))
    rows[1]["latency_ms"]["1"] |= {"speedup": 1.25, "graph": {"median": 0.5, "p10": 0.4, "p90": 0.75}}
    write_results(tmp_path, rows, meta)
    with open(tmp_path / "results.csv", newline="") as file:
        dense, pruned = csv.DictReader(file)
    assert [pruned[f"latency_ms_1_{key}"] for key in ("speedup", "graph_median", "graph_p10", "graph_p90")] == [
        "1.25",
        "0.5",
        "0.4",
        "0.75",
    ]
    assert dense["latency_ms_1_graph_median"] == "" and timings(rows) == ["1", "1_graph", "64"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2, "rows": []}', '{"format": 1}'])
def test_unreadable_results_are_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_results(tmp_path)
    assert len(caught.value.faults) == 1 and "results.json" in str(caught.value)
