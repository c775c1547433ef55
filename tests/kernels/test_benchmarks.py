"""Oracle: given results and times; the benchmarks must show no speed for a form that fails or computes something else."""

import subprocess
import sys

import pytest
import torch

from benchmarks import _cases, _own, _rivals, _sides, _timing
from benchmarks import kernels as gpu
from kernels import SparseLinear, formats, timing

from .subprocesses import ROOT


def fixed(monkeypatch, medians: list[float]) -> None:
    monkeypatch.setattr(timing, "on_cpu", lambda calls, *rest, **more: [timing.Timing(m, 0.9 * m, 1.1 * m, 5) for m in medians[: len(calls)]])


def test_wrong_and_failing_forms_show_no_speed(monkeypatch):
    fixed(monkeypatch, [100.0, 50.0])
    expected = torch.ones(3, dtype=torch.float64)

    def fails():
        raise RuntimeError("no such kernel\nmore")

    calls = {
        "dense": lambda: torch.ones(3),
        "off": lambda: torch.full((3,), 1.01),
        "nan": lambda: torch.full((3,), float("nan")),
        "fails": fails,
        "good": lambda: torch.ones(3),
    }
    rows = _timing.compare(calls, expected, 0.1)
    assert rows["good"]["ratio"] == 2.0 and rows["dense"]["ratio"] == 1.0
    assert rows["off"] == {"wrong": pytest.approx(0.01, rel=1e-3)} and rows["nan"]["wrong"] == float("inf")
    assert rows["fails"] == {"failed": "RuntimeError: no such kernel"}
    text = _timing.line("case", rows)
    assert "good 2.00 (1.82..2.22)" in text and "off wrong" in text and "fails failed" in text


def test_byte_bound_of_run16():
    """16 bits over 21 bits per kept weight in nibbles, 25 in bytes."""
    assert gpu.byte_bound(0.5) == pytest.approx(1.52, abs=0.01) and gpu.byte_bound(0.9) == pytest.approx(6.4)
    assert gpu.byte_bound(0.5, 4) == pytest.approx(2 * 32 / 37) and gpu.byte_bound(0.9, 4) == pytest.approx(10 * 32 / 41)


@pytest.mark.parametrize("pattern, height, width", [("random", 1, 1), ("vectors", 64, 1), ("blocks", 64, 64), ("panels", 64, 16)])
def test_masks_have_their_pattern_and_sparsity(pattern, height, width):
    mask = _cases.mask(640, 2048, 0.7, pattern, torch.Generator().manual_seed(0))
    cells = mask.view(640 // height, height, 2048 // width, width)
    assert torch.equal(cells.any(3).any(1), cells.all(3).all(1))
    assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.06)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_benchmark_says_what_is_missing():
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs an NVIDIA GPU and none was found" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def once(monkeypatch):
    """The benchmark's cases on the CPU path: every call of every copy runs once."""
    def timed(calls, rounds=30):
        return [timing.Timing(float(len(alternatives)), 1.0, 1.0, len([call() for call in alternatives])) for alternatives in calls]

    monkeypatch.setattr(timing, "on_cuda", timed)
    monkeypatch.setattr(timing, "capture", lambda calls: calls)
    monkeypatch.setattr(timing, "replay", timed)
    monkeypatch.setattr(timing, "copies_needed", lambda size, device, most: 2)
    monkeypatch.setattr(timing, "temperature", lambda rotated, device: "cold")


def test_every_side_of_the_gpu_benchmark_computes_the_same(once):
    """Each form that can run here must agree with float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        random = _cases.Matrix(128, 256, 0.8, "random", torch.float32, generator).measure(8, True, 9.0)
        assert {name for name, side in random.items() if "us" in side} == {"dense", "run16 nibbles", "run16 bytes", "torch CSR"}
        wide = _cases.Matrix(128, 256, 0.8, "random", torch.bfloat16, generator).measure(64, False, 9.0)
        assert {name for name, side in wide.items() if "us" in side} == {"dense", "two_four"}
        blocks = _cases.Matrix(128, 256, 0.8, "blocks", torch.float32, generator).measure(64, True, 9.0)
        assert {name for name, side in blocks.items() if "us" in side} >= {"dense", "vector_block 64", "vector_block 128"}
        conv = _cases.convolution_case(16, 64, 3, 6, 1, 0.8, "panels", torch.float32, generator, 9.0)
        assert {name for name, side in conv.items() if "us" in side} == {"dense", "sparse_conv 64", "sparse_conv 128", "sparse_conv 64, full list"}
        assert all(side["copies"] == 2 and side["cache"] == "cold" for side in conv.values())


def test_bytes_of_every_side(once, monkeypatch):
    """What a product reads and writes, by hand: dense, CSR with 32- or 64-bit indices, vector blocks with their lists, and 9 bits of 16 for 2:4."""
    matrix = _cases.Matrix(128, 256, 0.5, "vectors", torch.bfloat16, torch.Generator().manual_seed(0))
    layer, x = matrix.layer, torch.ones(8, 256, dtype=torch.bfloat16)
    expected = x.double() @ layer.weight.double().t()
    kept = int((layer.weight != 0).sum())
    assert _rivals.dense(layer, x).weight_bytes == 128 * 256 * 2
    csr = _rivals.torch_csr(layer.float(), x.float(), expected, 9.0)
    bits = int(csr.facts["settings"][:2])
    assert csr.weight_bytes == kept * (4 + bits // 8) + 129 * bits // 8
    layer.to(torch.bfloat16)
    form = SparseLinear.from_dense(layer, format="vector_block", height=64)
    assert _own.weight_bytes(form.packed) == form.values.numel() * 2 + form.values.shape[0] * form.values.shape[1] * 4 + 3 * 4 + 2 * 4
    two_four = SparseLinear.from_dense(layer, format="two_four")
    assert _own.weight_bytes(two_four.packed) - formats.pack("two_four", layer.weight).bytes == 0
    side = _sides.Side([lambda: layer(x)], 1000)
    monkeypatch.setattr(timing, "replay", lambda graphs: [timing.Timing(2.0, 1.0, 3.0, 5)])
    times = _sides.compare({"dense": lambda: side}, x, expected)
    _sides.describe(times, 100.0)
    assert times["dense"]["bytes"] == 1000 + 8 * 256 * 2 + 8 * 128 * 2
    assert times["dense"]["gb_s"] == pytest.approx(times["dense"]["bytes"] / 2e3) and times["dense"]["share_of_copy"] == times["dense"]["gb_s"] / 100


def test_a_side_that_cannot_be_captured_fails_alone(monkeypatch):
    def capture(calls):
        if calls[0]() is None:
            raise AssertionError("unreachable")
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return calls

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "replay", lambda graphs: [timing.Timing(10.0, 9.0, 11.0, 5) for _ in graphs])
    right = lambda: torch.ones(3)  # noqa: E731
    rows = _timing.compare_cuda({"dense": [right], "rival": [right] * 3}, torch.ones(3, dtype=torch.float64))
    assert rows["dense"]["us"] == 10.0 and "not permitted" in rows["rival"]["failed"]
    rows = _timing.compare_cuda({"dense": [right] * 3, "rival": [right]}, torch.ones(3, dtype=torch.float64))
    assert "ratio" not in rows.get("rival", {}) and "dense failed" in _timing.line("case", rows)


def test_cases_that_were_measured_are_skipped():
    options = gpu.arguments(["--part", "linear", "--shapes", "3072x768", "--columns", "1", "8", "--sparsities", "0.9"])
    facts = list(gpu.cases(options, {("linear", "3072x768", 1, "random", 0.9)}))
    assert [(f["pattern"], f["columns"]) for f in facts] == [("random", 8), *((p, n) for p in ("vectors", "blocks") for n in (1, 8))]
    assert facts[0] == {"kind": "linear", "name": "3072x768", "columns": 8, "pattern": "random", "sparsity": 0.9}
    assert len(list(gpu.cases(gpu.arguments(["--part", "conv"]), set()))) == len(_cases.CONVOLUTIONS) * 5 * 2 * 2
