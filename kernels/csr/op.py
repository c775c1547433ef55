"""The operators `compress_kernels::csr_linear` and `csr_conv2d`, and the packing that feeds them.

options = (engine,): which code multiplies on the CPU, see ENGINES. Other devices use torch's own CSR product for matrices.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import convolution, epilogue, operator
from ..formats import Packed
from . import compiled, reference

ENGINES = reference.ENGINES
# Bytes of patches held at a time: larger than any cache, so that pieces cost no speed, and small beside a batch of large images, whose
# patches take r * s times its memory.
PATCHES = 256 * 2**20


def _as_torch(values: Tensor, index: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    return torch.sparse_csr_tensor(index[0], index[1].to(torch.int32), values, (rows, columns), check_invariants=False)


@functools.cache
def _hear_beta_warning() -> None:
    """torch announces once per process that CSR tensors are in beta; nothing about the results depends on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ends = torch.tensor([0, 1], dtype=torch.int32, device="cpu")
        _as_torch(torch.zeros(1, dtype=torch.float32, device="cpu"), [ends, ends[:1]], 1, 1)


def _scipy(x: Tensor, values: Tensor, index: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """W x for x [columns, n], contiguous."""
    from scipy import sparse

    crow, col = index[0].numpy(), index[1].to(torch.int32).numpy()
    return torch.from_numpy(sparse.csr_array((values.detach().numpy(), col, crow), shape=(rows, columns), copy=False) @ x.numpy())


def usable(engine: str, x: Tensor, values: Tensor) -> bool:
    """Whether `engine` can multiply these tensors."""
    if engine == "torch":
        return values.dtype == torch.float32 or x.is_cuda
    return x.device.type == "cpu" and values.dtype == torch.float32 and (engine == "scipy" or compiled.library() is not None)


def _product(x: Tensor, values: Tensor, index: Sequence[Tensor], bias: Tensor | None, relu: bool, rows: int, columns: int,
             engine: str) -> tuple[Tensor, bool]:
    """(y [..., rows, n], whether bias and activation are already in it) for x [..., columns, n] with at most one leading dimension, of
    any strides."""
    if engine == "compiled":
        loaded, threads = compiled.library(), torch.get_num_threads()
        if x.shape[-1] == 1 and x.ndim == 2:
            return compiled.vector(loaded, x.reshape(-1).contiguous(), values, *index, bias, relu, threads).unsqueeze(1), True
        return compiled.matrix(loaded, x, values, *index, bias, relu, threads), True
    x = x.contiguous()
    images = x.unsqueeze(0) if x.ndim == 2 else x
    if engine == "scipy":
        results = [_scipy(image, values, index, rows, columns) for image in images]
    else:
        weight = _as_torch(values, index, rows, columns)
        results = [weight @ image for image in images]
    return (results[0] if x.ndim == 2 else torch.stack(results)), False


def _engine(options: Sequence[int], x: Tensor, values: Tensor) -> str | None:
    return next((e for e in (ENGINES[options[0]], *ENGINES) if usable(e, x, values)), None)


def _linear(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str) -> Tensor | None:
    engine = _engine(options, x, values)
    if engine is None:
        return None
    fused = scale is None and residual is None and activation in ("none", "relu")
    dtype, given = operator.wide(x.dtype, scale), bias if fused else None
    factor, values = x.t().to(dtype), values.detach().to(dtype)
    product, done = _product(factor, values, index, given, activation == "relu" and fused, rows, columns, engine)
    product = product.t()
    return (product if done and fused else epilogue.finish(product, scale, bias, residual, activation)).to(x.dtype).contiguous()


def _by_patches(x: Tensor, values: Tensor, index, bias: Tensor | None, relu: bool, rows: int, columns: int, engine: str,
                size, kernel, stride, padding, dilation) -> tuple[Tensor, bool]:
    """(y [N, rows, *size], whether bias and activation are already in it), with at most PATCHES bytes of patches (or one line of one
    image) at a time: whole images together where they fit, bands of output lines where one image does not."""
    given = values, index, bias, relu, rows, columns, engine
    lines = max(1, PATCHES // (columns * size[1] * x.element_size()))
    if x.shape[0] * size[0] <= lines:
        product, done = _product(F.unfold(x, kernel, dilation, padding, stride), *given)
        return product.view(x.shape[0], rows, *size), done
    images, height = max(1, lines // size[0]), min(lines, size[0])
    y, done = x.new_empty(x.shape[0], rows, *size), False
    for first in range(0, x.shape[0], images):
        padded = F.pad(x[first : first + images], (padding[1], padding[1], padding[0], padding[0]))
        for top in range(0, size[0], height):
            target = y[first : first + images, :, top : top + height]
            last = (top + target.shape[2] - 1) * stride[0] + dilation[0] * (kernel[0] - 1)
            patches = F.unfold(padded[:, :, top * stride[0] : last + 1], kernel, dilation, 0, stride)
            product, done = _product(patches, *given)
            target.copy_(product.view(target.shape))
    return y, done


def _conv2d(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str,
            kernel, stride, padding, dilation) -> Tensor | None:
    engine = _engine(options, x, values)
    if engine is None:
        return None
    size = convolution.output_size(x.shape[2:], kernel, stride, padding, dilation)
    fused = scale is None and residual is None and activation in ("none", "relu")
    given, relu = (bias if fused else None), activation == "relu" and fused
    before, dtype = x.dtype, operator.wide(x.dtype, scale)
    x, values = x.to(dtype), values.detach().to(dtype)
    if tuple(kernel) == (1, 1):
        if any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        x = x[:, :, :: stride[0], :: stride[1]].contiguous()
        product, done = _product(x.flatten(2), values, index, given, relu, rows, columns, engine)
        product = product.view(x.shape[0], rows, *size)
    elif engine == "compiled" and compiled.reaches(x, stride, padding):
        x, threads = x.contiguous(), torch.get_num_threads()
        product = compiled.convolve(compiled.library(), x, size, kernel, stride, padding, dilation, values, *index, given, relu, threads)
        done = True
    else:
        product, done = _by_patches(x, values, index, given, relu, rows, columns, engine, size, kernel, stride, padding, dilation)
    return (product if done and fused else epilogue.finish(product, scale, bias, residual, activation, dim=1).contiguous()).to(before)


csr_linear = operator.define_linear("csr_linear", reference.positions, None, _linear)
csr_conv2d = convolution.define_conv("csr_conv2d", reference.positions, None, _conv2d, torch.contiguous_format)


def pack(weight: Tensor, mask: Tensor | None = None, engine: str = "compiled") -> Packed:
    """Packs the matrix `weight` [c_out, c_in * r * s]; `engine` is one of ENGINES and gives way to another where it cannot run."""
    if engine not in ENGINES:
        raise ValueError(f"the CSR engine {engine!r} is not one of {', '.join(ENGINES)}")
    values, index = reference.pack(weight, mask, narrow=engine == "compiled")
    _hear_beta_warning()
    bytes_ = sum(t.numel() * t.element_size() for t in (values, *index))
    return Packed("csr", values, index, weight.shape[0], weight.shape[1], values.numel(), (ENGINES.index(engine),), bytes_)
