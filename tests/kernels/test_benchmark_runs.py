"""Oracle: the rows that a benchmark run must leave behind, whatever its cases do."""

import json
import os
import sys
import time
import types

import pytest
import torch
from torch import nn

from benchmarks import _timing, _worker, sparse_model
from kernels import precision, timing
from kernels.table import device_name

CPU = torch.device("cpu")


def case(job: dict) -> dict:
    """Dies, raises, or answers with the number of the process."""
    if job["do"] == "die":
        os._exit(7)
    if job["do"] == "raise":
        raise ValueError("no such layer\nmore")
    if job["do"] == "sleep":
        time.sleep(60)
    return {"dense": {"us": 1.0, "process": os.getpid()}, **({"rival": {"failed": "x"}} if job["do"] == "rival" else {})}


def test_a_case_that_kills_its_process_loses_only_itself():
    worker = _worker.Worker(case, 120.0)
    try:
        first = worker.run({"do": "measure"})["dense"]["process"]
        assert worker.run({"do": "measure"})["dense"]["process"] == first != os.getpid()
        assert worker.run({"do": "die"}) == {"failed": "ended the process (exit code 7)"}
        second = worker.run({"do": "rival"})["dense"]["process"]
        assert second != first
        # A side that failed may have left the GPU in any state.
        assert worker.run({"do": "measure"})["dense"]["process"] != second
        assert worker.run({"do": "raise"}) == {"failed": "ValueError: no such layer"}
        worker.seconds = 0.5
        assert worker.run({"do": "sleep"}) == {"failed": "took longer than 0.5 seconds"}
    finally:
        worker.close()


def test_rows_of_another_machine_are_kept_but_not_known(tmp_path):
    row = {"kind": "linear", "name": "a", "columns": 1, "sparsity": 0.5}
    good, bad = {"dense": {"us": 4.0}, "x": {"us": 2.0, "ratio": 2.0}}, {"dense": {"wrong": 4e-4}, "x": {"us": 1.0, "ratio": 1.0}}
    given = [{**row, "times": good}, {**row, "machine": "another", "name": "b", "times": good}, {**row, "name": "c", "times": bad}]
    path = _timing.write("t", CPU, given, tmp_path)
    rows = _timing.read("t", tmp_path)
    assert [r["machine"] for r in rows] == [device_name(CPU), "another", device_name(CPU)]
    assert [r["name"] for r in _timing.of_machine(rows, CPU)] == ["a", "c"]
    table = path.with_suffix(".md").read_text()
    assert "| linear a, N 1 | dense | 4 us |" in table and "linear b" not in table and "| linear c, N 1 | dense | - |" in table
    assert "dense failed" in _timing.line("case", {"failed": "out of memory"})


def test_a_result_file_is_complete_or_as_before(tmp_path, monkeypatch):
    path = _timing.write("t", CPU, [{"case": 1}], tmp_path)
    before = path.read_text()

    def cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        _timing.write("t", CPU, [{"case": 1}, {"case": 2}], tmp_path)
    assert path.read_text() == before


def test_float32_may_be_rounded_where_torch_allows_it(monkeypatch):
    """TF32 keeps 10 bits of 23: 3e-4 to 8e-4, which is no fault of the dense side where the flags allow it, and one where they do not."""
    y = type("Tensor", (), {"is_cuda": True, "dtype": torch.float32, "ndim": 2})()
    monkeypatch.setattr(precision, "convolutions_in_tf32", lambda: True)
    monkeypatch.setattr(precision, "products_in_tf32", lambda: False)
    assert _timing.tolerance(y) == 1e-3
    y.ndim = 4
    assert _timing.tolerance(y) == 2e-3
    y.ndim = 2
    monkeypatch.setattr(precision, "convolutions_in_tf32", lambda: False)
    assert _timing.tolerance(y) == 1e-5


def test_tolerances_are_those_of_sums_in_float32():
    """A product that adds in its own data type is further off; images may come from Winograd's algorithm, except in bfloat16."""
    kinds = torch.float32, torch.float16, torch.bfloat16
    assert [_timing.tolerance(torch.zeros(1, 1, dtype=kind)) for kind in kinds] == [1e-5, 1e-3, 8e-3]
    assert [_timing.tolerance(torch.zeros(1, 1, 1, 1, dtype=kind)) for kind in kinds] == [1e-4, 5e-3, 8e-3]
    exact = torch.randn(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in kinds[1:]:
        once = exact.to(kind)
        twice = (exact - exact.roll(1)).to(kind) + exact.roll(1).to(kind)
        in_kind = sum((part.to(kind) for part in exact.split(1, 1)), torch.zeros(64, 1, dtype=kind))
        assert _timing.fault(once, exact) is None and _timing.fault(twice, exact) is None
        assert _timing.fault(in_kind, exact.sum(1, keepdim=True)) is not None


def test_a_result_of_another_shape_is_wrong():
    assert _timing.fault(torch.ones(1, 3), torch.ones(3, dtype=torch.float64)) == "wrong by inf"


def test_measuring_that_fails_is_a_failed_side(monkeypatch):
    def fails(*given):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "on_cpu", fails)
    rows = _timing.compare({"dense": lambda: torch.ones(2)}, torch.ones(2, dtype=torch.float64), 0.1)
    assert rows == {"dense": {"failed": "RuntimeError: an illegal memory access was encountered"}}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A network of two layers in the place of the large ones."""
    class Tiny(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 64))

    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(sparse_model, "own", lambda name: types.SimpleNamespace(build=lambda *given: Tiny()))
    on_cpu = timing.on_cpu
    monkeypatch.setattr(timing, "on_cpu", lambda calls, seconds, *rest, **more: on_cpu(calls, 0.0, 2, True))
    return tmp_path


def test_a_network_before_and_after(tiny):
    row = sparse_model.measure("tiny", 10, 8, 0.9, 2, CPU, 0.01)
    assert row["ratio"] == pytest.approx(row["before_ms"] / row["after_ms"]) and sum(row["layers"].values()) == 2
    assert len(row["errors"]) == 2 and max(row["errors"]) < 1e-5
    model = sparse_model.masked_network("tiny", 10, 0.9)
    assert bool((model[0].weight != 0).all()) and float((model[2].weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_a_sparse_network_that_is_less_exact_than_dense_shows_no_speed(tiny, monkeypatch):
    class Off(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * 1.001

    monkeypatch.setattr(sparse_model, "sparsify", lambda model, x, seconds: (Off(model), None))
    row = sparse_model.measure("tiny", 10, 8, 0.9, 2, CPU, 0.01)
    assert row["wrong"] == pytest.approx(1e-3, rel=0.01) and row["dense_error"] < 1e-5 and "ratio" not in row


def test_failed_rows_are_kept_and_retried_on_request(tiny, monkeypatch):
    calls = []

    def fails(*given):
        calls.append(given)
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(sparse_model, "measure", fails)
    given = ["sparse_model", "--device", "cpu", "--cases", "cifar", "--models", "vgg16", "--batches", "1", "--sparsities", "0.5", "--out", str(tiny)]
    for more, count in ([], 1), ([], 1), (["--retry"], 2):
        monkeypatch.setattr(sys, "argv", given + more)
        sparse_model.main()
        assert len(calls) == count
        (row,) = json.loads((tiny / "sparse_model_cpu.json").read_text())["rows"]
        assert row["failed"] == "RuntimeError: out of memory" and row["machine"] == device_name(CPU)


def test_networks_are_measured_again_after_the_kernels_changed(tiny, monkeypatch):
    given = ["sparse_model", "--device", "cpu", "--cases", "cifar", "--models", "vgg16", "--batches", "1", "--sparsities", "0.5", "--out", str(tiny)]
    monkeypatch.setattr(sys, "argv", given)
    for kernels, seconds in (("a", 1.0), ("a", 2.0), ("b", 3.0)):
        monkeypatch.setattr(sparse_model, "version", lambda kernels=kernels: kernels)
        monkeypatch.setattr(sparse_model, "measure", lambda *job, seconds=seconds: {"after_ms": seconds})
        sparse_model.main()
        (row,) = json.loads((tiny / "sparse_model_cpu.json").read_text())["rows"]
        assert (row["kernels"], row["after_ms"]) == (("a", 1.0) if kernels == "a" else ("b", 3.0))
