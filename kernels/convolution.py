"""The convolution counterpart of operator.py: a packed weight [c_out, c_in * r * s] as a differentiable, exportable torch operator.

`positions` address the dense weight in torch's order [c_out, c_in, r, s]. Zero padding only, one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import epilogue
from .operator import (NAMESPACE, Direct, Launch, Positions, check_tensors, decode, existing, plain, register_autocast, runs_triton, take,
                       wide)

SCHEMA = (
    "(Tensor x, Tensor values, Tensor[] index, Tensor? scale, Tensor? bias, Tensor? residual, int rows, int columns, int kept, "
    "int[] options, str activation, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor"
)


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                dilation: Sequence[int]) -> tuple:
    """(height, width) of the output for an input of (height, width) `size`."""
    return tuple((size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1))


def _shape(x: Tensor, residual: Tensor | None, rows: int, columns: int, kernel, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape, or one sentence about what does not fit."""
    channels, rest = divmod(columns, kernel[0] * kernel[1])
    if rest:
        raise ValueError(f"a matrix of {columns} columns is no convolution with a kernel of {kernel[0]} x {kernel[1]}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"the input has shape {list(x.shape)}, but a batch of images with {channels} channels is needed")
    height, width = output_size(x.shape[2:], kernel, stride, padding, dilation)
    if height < 1 or width < 1:
        image = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"the input of {image} pixels is smaller than the convolution's kernel of {kernel[0]} x {kernel[1]}")
    shape = (x.shape[0], rows, height, width)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"the residual has shape {list(residual.shape)}, but the output has {list(shape)}")
    return shape


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, shape: Sequence[int], geometry: Sequence) -> Tensor:
    """The convolution in front of `scale`, of that shape; torch refuses some empty tensors, whose product is zero."""
    if not (x.numel() and weight.numel()):
        return x.new_zeros(shape)
    dtype = wide(x.dtype, scale)
    return F.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)


def pointwise(op: Callable[..., Tensor], x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, kept: int,
              options, activation: str, kernel, stride, padding, dilation) -> Tensor:
    """The convolution of 1 x 1 by the operator `op` (schema operator.LINEAR_SCHEMA) of a format that has only matrices: every pixel is a row
    of its x, without a copy for channels_last images of stride 1. y [N, c_out, h, w] is channels_last."""
    _shape(x, residual, rows, columns, kernel, stride, padding, dilation)
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    pixels = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    return op(pixels, values, index, scale, bias, added, rows, columns, kept, options, activation).permute(0, 3, 1, 2)


def define_conv(name: str, positions: Positions, launch: Launch | None, direct: Direct | None,
                memory_format: torch.memory_format) -> Callable[..., Tensor]:
    """Registers `compress_kernels::<name>` (schema SCHEMA) and returns it; y [N, c_out, h, w] always has `memory_format`.

    launch and direct as in define_linear, with x [N, c_in, H, W] and the four geometry arguments behind `activation`.
    """
    found = existing(name)
    if found is not None:
        return found

    def forward(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, kept: int, options, activation: str,
                kernel, stride, padding, dilation) -> Tensor:
        shape = _shape(x, residual, rows, columns, kernel, stride, padding, dilation)
        check_tensors(x, values, {"the scale": scale, "the bias": bias}, residual, rows)
        epilogue.check(activation)
        geometry = (kernel, stride, padding, dilation)
        values, scale, bias, *index = plain(values, scale, bias, *index)
        if x.numel() and rows:
            run = launch if launch is not None and runs_triton(x) else direct
            y = run(x, values, index, scale, bias, residual, rows, columns, options, activation, *geometry) if run is not None else None
            if y is not None:
                return y
        weight = decode(values, positions(values, index, rows, columns, options), rows, columns).view(rows, x.shape[1], *kernel)
        product = _product(x, weight, scale, shape, geometry[1:])
        y = epilogue.finish(product, scale, bias, residual, activation, dim=1)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format).copy_(y)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=SCHEMA)

    @op.register_fake
    def _(x, values, index, scale, bias, residual, rows, columns, kept, options, activation, kernel, stride, padding, dilation):
        shape = (x.shape[0], rows, *output_size(x.shape[2:], kernel, stride, padding, dilation))
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)

    def setup_context(ctx, inputs, output):
        x, values, index, scale, bias, residual, ctx.rows, ctx.columns, _, ctx.options, ctx.activation, *ctx.geometry = inputs
        ctx.save_for_backward(x, values, scale, bias, residual, output if ctx.activation == "relu" else None, *index)

    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return gradients(ctx, grad)

    def gradients(ctx, grad):
        x, values, scale, bias, residual, output, *index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        kernel, stride, padding, dilation = ctx.geometry
        places = positions(values, index, ctx.rows, ctx.columns, ctx.options)
        weight = decode(values, places, ctx.rows, ctx.columns).view(ctx.rows, x.shape[1], *kernel)
        needed = ctx.activation in ("gelu", "silu") or needs[3]
        product = _product(x, weight, scale, grad.shape, (stride, padding, dilation)) if needed else None
        if ctx.activation == "relu":
            grad = grad * epilogue.slope(output, "relu")
        elif ctx.activation != "none":
            grad = (grad * epilogue.slope(epilogue.finish(product, scale, bias, residual, "none", dim=1), ctx.activation)).to(grad.dtype)
        d_residual = grad if residual is not None and needs[5] else None
        d_bias = grad.sum((0, 2, 3)) if bias is not None and needs[4] else None
        d_scale = (grad * product).sum((0, 2, 3)).to(scale.dtype) if scale is not None and needs[3] else None
        if scale is not None:
            grad = grad * epilogue.along(scale, 4, 1)
        if grad.numel() and weight.numel():
            d_x, d_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [needs[0], needs[1], False]
            )
        else:
            d_x, d_weight = torch.zeros_like(x) if needs[0] else None, torch.zeros_like(weight)
        d_values = take(d_weight.reshape(ctx.rows, ctx.columns), places).reshape(values.shape) if needs[1] else None
        return d_x, d_values, [None] * len(index), d_scale, d_bias, d_residual, *[None] * 9

    op.register_autograd(backward, setup_context=setup_context)
    register_autocast(name)
    overload = existing(name)

    @register_flop_formula(overload)
    def _(x_shape, values_shape, index, scale, bias, residual, rows, columns, kept, options, activation, kernel, stride, padding, dilation,
          *args, out_shape=None, **kwargs) -> int:
        height, width = output_size(x_shape[2:], kernel, stride, padding, dilation)
        return 2 * kept * x_shape[0] * height * width

    return overload
