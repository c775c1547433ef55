"""Oracle: what a fresh table leads to; a stored measurement must lead to the same, and a form that failed must leave no trace."""

import json
import math

import pytest
import torch
from torch import nn

from kernels import SparseLinear, candidates, measure, sparsify, table, timing
from kernels.candidates import Candidate
from kernels.table import Table, default_path, layer_key

from .masks import masked

LAYER_TIMES = measure.layer_times


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    """A folder for the table; sparse forms that compute the same take half the time."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    on_cpu = timing.on_cpu

    def halves(calls, *rest, **more):
        on_cpu(calls, 0.0, 1)
        return [timing.Timing(100.0 if number == 0 else 50.0, 1, 1, 5) for number in range(len(calls))]

    monkeypatch.setattr(timing, "on_cpu", halves)
    monkeypatch.setattr(measure, "HOPELESS", 1e9)
    return tmp_path


def network(poison: float = 0.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model[0].weight.data = masked(32, 32, 0.9, "random", torch.Generator().manual_seed(0))
    row, column = model[0].weight.nonzero()[0]
    model[0].weight.data[row, column] += poison
    return model


def stored() -> dict:
    """The table's file, which must be JSON as the standard has it."""
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(default_path().read_text(), parse_constant=refuse) if default_path().exists() else {}


def key_of(model: nn.Sequential) -> str:
    return layer_key(model[0], (4, 32), False, float((model[0].weight != 0).float().mean()))


def test_a_network_with_nan_leaves_nothing_to_the_next():
    x = torch.randn(4, 32)
    sick = sparsify(network(math.nan), x)[1]
    assert sick.replaced == [] and "csr torch (it differs from the dense layer by nan)" in sick.choices[0].reason
    assert stored() == {}
    assert "differs" in sparsify(network(math.nan), x)[1].choices[0].reason
    assert sparsify(network(), x)[1].replaced == ["0"]
    assert "dense" in stored()[key_of(network())]
    after = sparsify(network(math.nan), x, remeasure=True)[1]
    assert after.replaced == [] and sparsify(network(), x)[1].replaced == ["0"]


def test_a_form_that_failed_once_is_tried_again(monkeypatch):
    model, x, failures = network(), torch.randn(4, 32), ["CUDA out of memory"]

    def build():
        if failures:
            raise torch.OutOfMemoryError(failures.pop())
        return SparseLinear.from_dense(model[0], format="csr")

    monkeypatch.setattr(candidates, "eligible", lambda layer, shape: [Candidate("moody", build)])
    first = sparsify(model, x)[1]
    assert first.replaced == [] and "not usable: moody (CUDA out of memory)" in first.choices[0].reason
    second = sparsify(model, x)[1]
    assert second.replaced == ["0"] and "not usable" not in second.choices[0].reason


def test_what_autocast_refuses_counts_only_under_autocast():
    """There a float32 layer returns bfloat16, which a sparse one does not."""
    model, x = network(), torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = sparsify(model, x)[1]
    assert report.replaced == [] and "torch.float32 [4, 32] instead of torch.bfloat16" in report.choices[0].reason
    assert sparsify(model, x)[1].replaced == ["0"]


def test_a_hopeless_form_is_stored_as_null(monkeypatch):
    model, x = network(), torch.randn(4, 32)
    monkeypatch.setattr(measure, "HOPELESS", 0.0)
    first = sparsify(model, x)[1]
    row = stored()[key_of(model)]
    assert row.pop("dense") == 100.0 and row and set(row.values()) == {None}
    monkeypatch.setattr(measure, "layer_times", lambda *given: pytest.fail("measured again"))
    assert [c.reason for c in sparsify(model, x)[1].choices] == [c.reason for c in first.choices]


def test_keys_name_the_state_that_a_time_depends_on(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    plain = table.settings(cpu, torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast torch.bfloat16" in table.settings(cpu, torch.float32, False) != plain
        assert table.settings(cuda, torch.float32, False) == table.settings(cuda, torch.float32, False)
        with torch.autocast("cpu", dtype=torch.float16):
            assert "autocast torch.float16" in table.settings(cpu, torch.float32, False)
        with torch.autocast("cpu", enabled=False):
            assert table.settings(cpu, torch.float32, False) == plain
    before = [table.settings(cuda, torch.float16, convolution) for convolution in (False, True)]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    after = [table.settings(cuda, torch.float16, convolution) for convolution in (False, True)]
    assert after[0] == before[0] and after[1] != before[1]


def test_other_kernels_are_measured_anew(monkeypatch):
    model, x = network(), torch.randn(4, 32)
    sparsify(model, x)
    monkeypatch.setattr(table, "version", lambda: "another")
    measured = []
    monkeypatch.setattr(measure, "layer_times", lambda *given: measured.append(1) or LAYER_TIMES(*given))
    sparsify(model, x)
    assert measured and len(stored()) == 2


def test_a_table_keeps_times_and_hopeless_forms():
    Table(default_path()).put("key", {"dense": 1.0, "csr torch": math.inf})
    assert Table(default_path()).get("key", ["dense", "csr torch"]) == {"dense": 1.0, "csr torch": math.inf}
    assert Table(default_path()).get("key", ["dense", "run16"]) is None
    assert stored() == {"key": {"dense": 1.0, "csr torch": None}}


ROW = '{"dense": 100.0, "csr torch": Infinity}'
BAD = {
    "cut": b"{broken", "not text": b"\xff\xfe\x00", "a list": b"[1]", "rows are no objects": b'{"k": 1, "l": [2], "m": null}',
    "times are no numbers": b'{"k": {"dense": "fast", "csr torch": {}}}', "constants": f'{{"old key": {ROW}}}'.encode(),
    "not a number": b'{"k": {"dense": NaN}}', "larger than a float": b'{"k": {"dense": 1' + b"0" * 400 + b"}}",
    "very deep": b"[" * 200_000, "empty": b"",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_bad_files_count_as_empty(content):
    default_path().write_bytes(content)
    model, x = network(), torch.randn(4, 32)
    assert sparsify(model, x)[1].replaced == ["0"]
    assert list(stored()) == [key_of(model)]


def test_one_bad_row_does_not_cost_the_others():
    default_path().write_text(f'{{"old": {ROW}, "true": {{"dense": true}}, "negative": {{"dense": -1}}, "good": {{"dense": 2, "far": null}}}}')
    read = Table(default_path())
    assert read.rows == {"good": {"dense": 2.0, "far": math.inf}}
    read.put("new", {"dense": 3.0})
    assert stored() == {"good": {"dense": 2.0, "far": None}, "new": {"dense": 3.0}}


@pytest.mark.parametrize("row", [{"dense": None, "csr torch": 1.0}, {"csr torch": 1.0}, {"dense": 0.0, "csr torch": 1.0}])
def test_a_row_without_a_dense_time_is_measured_anew(monkeypatch, row):
    model, x = network(), torch.randn(4, 32)
    labels = [c.label for c in candidates.eligible(model[0], (4, 32))]
    default_path().write_text(json.dumps({key_of(model): {**dict.fromkeys(labels, 1.0), **row}}))
    report = sparsify(model, x)[1]
    assert report.choices[0].dense_us == 100.0 and stored()[key_of(model)]["dense"] == 100.0


def test_a_path_that_cannot_be_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "file" / "kernels.json"):
        (tmp_path / "file").touch()
        assert sparsify(network(), torch.randn(4, 32), table=path)[1].replaced == ["0"]


def test_a_folder_that_may_not_be_read(monkeypatch, tmp_path):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "is_file", forbidden)
    assert sparsify(network(), torch.randn(4, 32))[1].replaced == ["0"]
