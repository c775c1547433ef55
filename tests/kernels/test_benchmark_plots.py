"""Oracle: bytes counted by hand, the committed results, and what the drawn figure says of itself."""

import sys

import pytest
import torch

from benchmarks import _timing
from benchmarks import kernels_cpu as cpu
from kernels import formats


def test_byte_bound_of_csr():
    """4 bytes of every weight over 6 of a kept one, so that two thirds of the weights read as much as all of them."""
    assert [cpu.byte_bound(s) for s in (0.5, 0.75, 0.9)] == pytest.approx([4 / 3, 8 / 3, 20 / 3])
    layer = torch.nn.Linear(512, 256)
    layer.weight.data *= torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) >= 0.9
    stored = formats.pack("csr", layer.weight)
    density = stored.kept / layer.weight.numel()
    assert layer.weight.numel() * 4 / (stored.bytes - 257 * 4) == pytest.approx(cpu.byte_bound(1 - density))


def test_cpu_plots_are_redrawn_from_the_results(monkeypatch, tmp_path):
    """Nothing is measured and no result changed; every plot has the bound and the fastest right form of every layer."""
    drawn = {}
    monkeypatch.setattr(_timing, "plot", lambda path, title, curves, bound=None: drawn.update({path.name: (curves, bound)}))
    monkeypatch.setattr(_timing, "compare", None)
    monkeypatch.setattr(_timing, "write", None)
    monkeypatch.setattr(sys, "argv", ["kernels_cpu", "--redraw"])
    cpu.main()
    assert set(drawn) == {path.name for path in _timing.RESULTS.glob("kernels_cpu_*.png")} and len(drawn) == 7
    assert all(bound is cpu.byte_bound for _, bound in drawn.values())
    curves, _ = drawn["kernels_cpu_linear_1.png"]
    times = next(row["times"] for row in _timing.read("kernels_cpu") if row["name"] == "4096x4096" and row["sparsity"] == 0.9)
    assert max(side["ratio"] for name, side in times.items() if name != "dense") == dict(curves["4096x4096"])[0.9]


def test_curves_can_be_told_apart(monkeypatch, tmp_path):
    """Twelve layers: no two look alike, and the legend hides none."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    _timing.plot(tmp_path / "p.png", "t", {str(n): [(0.5, 1.0 + n), (0.9, 2.0 + n)] for n in range(12)}, cpu.byte_bound)
    (axes,) = figures[0].axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert len(looks) == 13 and (tmp_path / "p.png").stat().st_size > 0
    figures[0].canvas.draw()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    monkeypatch.undo()
    pyplot.close(figures[0])
