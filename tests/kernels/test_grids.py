"""Oracle: float64 products, and CUDA's limits: 2^31 - 1 programs in the first dimension of a grid, 65,535 in the others."""

import contextlib
import importlib
import math

import pytest
import torch

from kernels import formats
from kernels.operator import interpreter_fault

from .subprocesses import json_lines

pytest.importorskip("triton")


@pytest.mark.skipif(interpreter_fault() is not None, reason=interpreter_fault() or "")
def test_many_blocks_and_tiles(tmp_path):
    """Every output belongs to one program, in whichever order they are numbered."""
    lines = json_lines("grids", interpret=True, cache=tmp_path)
    assert len(lines) == 6 and [line for line in lines if not line["error"] <= 1e-5] == []


class Grid:
    """Stands in for a kernel and remembers its grid and integers."""

    names: tuple[str, ...] = ()

    def __getitem__(self, grid):
        self.grid = grid

        def run(*given, **constants):
            self.given = dict(zip(self.names, given))

        return run


def fitting(grid: tuple[int, ...]) -> bool:
    return grid[0] < 2**31 and all(size <= 65535 for size in grid[1:])


@pytest.mark.parametrize("name, batch", [("run16", 16 * 70_000), ("vector_block", 128 * 70_000)])
def test_millions_of_columns_fit_the_grid(name, batch, monkeypatch):
    module = importlib.import_module(f"kernels.{name}.triton")
    kernel = Grid()
    monkeypatch.setattr(module, f"{name}_kernel", kernel)
    packed = formats.pack(name, torch.ones(70, 32, dtype=torch.bfloat16))
    index = [t.to("meta") for t in packed.index]
    x = torch.empty(batch, 32, device="meta", dtype=torch.bfloat16)
    module.launch(x, packed.values.to("meta"), index, None, None, None, 70, 32, list(packed.options), "none")
    assert fitting(kernel.grid) and math.prod(kernel.grid) >= batch // 128


def test_a_large_batch_of_large_images_fits_the_grid(monkeypatch):
    """224 x 224 pixels at batch 128 are 100,352 tiles of 64 pixels."""
    module = importlib.import_module("kernels.sparse_conv.triton")
    kernel = Grid()
    monkeypatch.setattr(module, "sparse_conv_kernel", kernel)
    packed = formats.pack("sparse_conv", torch.ones(128, 16 * 9), kernel=(3, 3), height=64)
    index = [t.to("meta") for t in packed.index]
    x = torch.empty(128, 16, 224, 224, device="meta")
    module.launch(x, packed.values.to("meta"), index, None, None, None, 128, 144, list(packed.options), "none", (3, 3), (1, 1), (1, 1), (1, 1))
    assert fitting(kernel.grid) and math.prod(kernel.grid) == 2 * 128 * 224 * 224 // 64


@pytest.mark.parametrize("name", ["run16", "vector_block"])
def test_no_two_launches_count_on_the_same_memory(name, monkeypatch):
    """Kernels of two streams may run at once: the counters of each launch are its own, and zero."""
    module = importlib.import_module(f"kernels.{name}.triton")
    kernel = Grid()
    kernel.names = getattr(module, f"{name}_kernel").arg_names
    monkeypatch.setattr(module, f"{name}_kernel", kernel)
    packed = formats.pack(name, torch.ones(70, 256), splits=2)
    counters = []
    for _ in range(2):
        module.launch(torch.ones(3, 256), packed.values, packed.index, None, None, None, 70, 256, list(packed.options), "none")
        counters.append(kernel.given["counter"])
    assert not any(counter.any() for counter in counters) and all(counter.numel() > 1 for counter in counters)
    assert len({counter.data_ptr() for counter in counters}) == 2


@pytest.mark.parametrize("reach, counted", [((1, 2**22), True), ((511, 0), True), ((1024, 0), False), ((0, 2**30), False)])
def test_taps_too_far_apart_are_refused(reach, counted, monkeypatch):
    """Offsets of taps are 32-bit integers; a line of this image has 2^22 numbers, and the image more than 2^31."""
    module = importlib.import_module("kernels.sparse_conv.triton")
    kernel = Grid()
    monkeypatch.setattr(module, "sparse_conv_kernel", kernel)
    size = (1200, 8192 if reach[1] == 0 else reach[1] + 1)
    channels = 512 if reach[1] == 0 else 16
    packed = formats.pack("sparse_conv", torch.ones(16, channels * 4), kernel=(2, 2), height=16)
    x = torch.empty(1, channels, *size, device="meta")
    given = (x, packed.values.to("meta"), [t.to("meta") for t in packed.index], None, None, None, 16, channels * 4, list(packed.options), "none")
    with contextlib.nullcontext() if counted else pytest.raises(ValueError, match=r"taps up to \d+ x \d+ pixels apart, are more than .* can count"):
        module.launch(*given, (2, 2), (1, 1), (0, 0), tuple(max(1, distance) for distance in reach))
        assert fitting(kernel.grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch, size", [(2, 6), (3, 6), (4, 6), (5, 6), (8, 6), (9, 6), (27, 6), (2, 1), (8, 1), (9, 1), (16, 1)])
def test_columns_of_x_are_words(batch, size, dtype):
    """Each group of up to eight columns of x lies side by side in int64 words, zeros behind the last one."""
    from kernels.run16.triton import _words, padded_batch

    x = torch.randn(batch, size, dtype=dtype)
    np_ = padded_batch(batch)
    chunks = -(-batch // np_)
    numbers = _words(x, np_, chunks).view(dtype).view(chunks, size, -1)
    width = max(np_, 8 // dtype.itemsize)
    assert numbers.shape == (chunks, size, width)
    flat = numbers.transpose(1, 2).reshape(-1, size)
    assert torch.equal(flat[:batch], x) and not flat[batch:].any()
