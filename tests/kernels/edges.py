"""Runs kernels on inputs at the edge of what they take, in Triton's interpreter, and prints one JSON line per case (started by test_interpreted_edges.py)."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kernels import SparseLinear, formats
from kernels.csr import op as csr

from .interpreted import KERNELS, TOLERANCE, relative_error
from .masks import masked

HALVES = (torch.bfloat16, torch.float16)


def show(case: str, y: Tensor, expected: Tensor, tolerance: float) -> None:
    print(json.dumps({"case": case, "error": relative_error(y.detach(), expected), "tolerance": tolerance}), flush=True)


def linear(name: str, weight: Tensor, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
           **options) -> Tensor:
    packed = formats.pack(name, weight, **options)
    op = formats.linear_operator(name)
    return op(x, packed.values, packed.index, scale, None, residual, *weight.shape, packed.kept, list(packed.options), activation)


def starts_between_words() -> None:
    """x and the values start at an address that only their own data type divides."""
    generator = torch.Generator().manual_seed(0)
    for name, dtype in ((name, dtype) for name in ("run16", "two_four") for dtype in (torch.float32, *HALVES)):
        for batch, columns in ((1, 40), (2, 40), (4, 40), (8, 40), (16, 40), (16, 4)):
            weight = masked(33, columns, 0.6, "random", generator).to(dtype)
            whole = torch.randn(columns * batch + 1, generator=generator).to(dtype)
            for x in (whole[1:].view(columns, batch).t(), whole[1:].view(batch, columns)):
                expected = x.double() @ weight.double().t()
                show(f"{name} {dtype} x {tuple(x.shape)} {x.stride()}", linear(name, weight, x), expected, 2 * TOLERANCE[dtype])
        dense = nn.Linear(40, 33, bias=False)
        dense.weight.data = masked(33, 40, 0.6, "random", generator)
        module = nn.Sequential(nn.Linear(5, 3, bias=False), SparseLinear.from_dense(dense, format=name)).to(dtype)
        vector_to_parameters(parameters_to_vector(module.parameters()).detach().clone(), module.parameters())
        x = torch.randn(2, 40, generator=generator).to(dtype)
        expected = x.double() @ dense.weight.to(dtype).double().t()
        show(f"{name} {dtype} values at {module[1].values.storage_offset()}", module[1](x), expected, 2 * TOLERANCE[dtype])


def scales() -> None:
    """640,000 is beyond float16, 640,000 / 4096 is not. Two kept of every four leave no remainder, all kept leave half."""
    x = torch.full((3, 64), 100.0).half()
    scale = torch.full((8,), 2.0**-12).half()
    residual = torch.full((3, 8), 50.0).half()
    half = torch.tensor([1.0, 0, 1, 0]).repeat(16)
    for name in (*KERNELS, "csr"):
        for mask, activation in ((torch.ones(64), "relu"), (half, "none")):
            weight = (100.0 * mask).repeat(8, 1).half()
            for added in (None, residual):
                expected = (x.double() @ weight.double().t()) * 2.0**-12 + (0 if added is None else added.double())
                y = linear(name, weight, x, scale, added, activation)
                show(f"{name} scale {int(mask.sum())} {added is not None} {y.dtype}", y, expected, 1e-3 if y.dtype == x.dtype else -1)


def csr_of_another_device() -> None:
    """On other devices than a CPU torch multiplies any data type; here `usable` is made to say so."""
    csr.usable = lambda engine, x, values: engine == "torch"
    x, weight, scale = torch.full((3, 64), 100.0).half(), torch.full((8, 64), 100.0).half(), torch.full((8,), 2.0**-12).half()
    show("csr matrix", linear("csr", weight, x, scale), torch.full((3, 8), 156.25), 1e-3)
    packed = formats.pack("csr", weight)
    op = formats.conv_operator("csr")
    for kernel in ((1, 1), (2, 2)):
        channels = 64 // (kernel[0] * kernel[1])
        y = op(torch.full((1, channels, 3, 3), 100.0).half(), packed.values, packed.index, scale, None, None, 8, 64, packed.kept,
               list(packed.options), "none", kernel, (1, 1), (0, 0), (1, 1))
        show(f"csr convolution {kernel} {y.dtype}", y, torch.full(y.shape, 156.25), 1e-3 if y.dtype == torch.float16 else -1)


def far_taps() -> None:
    """A tap a million pixels below: the pixels that fill up a tile must not reach it."""
    for reach in (2**19, 2**20, 2**21):
        weight = torch.randn(16, 16 * 2, generator=torch.Generator().manual_seed(1))
        packed = formats.pack("sparse_conv", weight, kernel=(2, 1), height=16, step=16)
        x = torch.zeros(1, 16, reach + 1, 1)
        x[:, :, 0], x[:, :, reach] = 1.0, 2.0
        y = formats.conv_operator("sparse_conv")(x, packed.values, packed.index, None, None, None, 16, 32, packed.kept, list(packed.options), "none",
                                                 (2, 1), (1, 1), (0, 0), (reach, 1))
        expected = (weight.view(16, 16, 2).double().sum(1) * torch.tensor([1.0, 2.0])).sum(1).view(1, 16, 1, 1)
        show(f"sparse_conv reach {reach}", y, expected, 1e-5)


def main() -> None:
    torch.set_num_threads(1)
    far_taps()
    scales()
    starts_between_words()
    csr_of_another_device()


if __name__ == "__main__":
    main()
