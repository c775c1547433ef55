"""The operators `compress_kernels::sparse_conv_conv2d` and `sparse_conv_linear` (the 1x1 case), and the packing that feeds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import convolution, operator
from ..formats import Packed
from ..vector_block.reference import stored_bytes
from . import reference


def _launch(*args) -> Tensor:
    from .triton import launch

    return launch(*args)


def _launch_linear(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str) -> Tensor:
    """A matrix product is the 1x1 convolution of one-pixel images."""
    images = x[:, :, None, None]
    added = None if residual is None else residual[:, :, None, None]
    unit = (1, 1)
    y = _launch(images, values, index, scale, bias, added, rows, columns, options, activation, unit, unit, (0, 0), unit)
    return y.reshape(x.shape[0], rows)


sparse_conv_linear = operator.define_linear("sparse_conv_linear", reference.positions, _launch_linear)
sparse_conv_conv2d = convolution.define_conv("sparse_conv_conv2d", reference.positions, _launch, None, torch.channels_last)


def pack(weight: Tensor, mask: Tensor | None = None, kernel: Sequence[int] = (1, 1), height: int = 64, group: int = 0, step: int = 0,
         pixels: int = 0, splits: int = 0, warps: int = 0) -> Packed:
    """Packs `weight` [c_out, c_in * r * s] (torch's order) for a kernel of r x s taps.

    `height` output channels share kept groups of `group` input channels (default: the largest of 16, 8, 1 that divides c_in).
    """
    channels = weight.shape[-1] // max(1, kernel[0] * kernel[1])
    group = group or reference.group_for(channels)
    step = step or (64 if weight.element_size() == 2 else 32)
    values, index = reference.pack(weight, kernel, height, group, step, mask)
    kept = int((weight != 0).sum() if mask is None else mask.sum())
    options = (group, kernel[0], kernel[1], pixels, splits, warps)
    return Packed("sparse_conv", values, index, weight.shape[0], weight.shape[1], kept, options, stored_bytes(values, index))
