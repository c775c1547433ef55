"""The sparse_conv format in plain torch: vector blocks over the columns (r, s, c_in), c_in fastest, in groups of G input channels.

V consecutive output channels share a list of kept (r, s, group) entries. With T steps of `step` columns in all B = ceil(c_out / V) blocks:

    values [T, step, V]
    index:
      kept [T, step / G]         int32: r << 24 | s << 16 | channel group
      step_ptr [B + 1], order [B], live [T, step, ceil(V/32)] int32, as in vector_block

options = (G, r, s, pixels per program, shares, warps); the last three are the kernel's (0: its own choice).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import inside, stored_once

from ..vector_block import reference as blocks

OPTIONS = 6
GROUPS = (16, 8)
MAX_TAPS, MAX_GROUPS = 128, 65536


def group_for(channels: int) -> int:
    """The largest group that divides the input channels: 16, 8, or 1 where every gather is a single element."""
    return next((group for group in GROUPS if channels % group == 0), 1)


def channels_last(matrix: Tensor, kernel: Sequence[int]) -> Tensor:
    """[rows, c_in * r * s] in torch's order to [rows, r * s * c_in]."""
    rows, columns = matrix.shape
    taps = kernel[0] * kernel[1]
    return matrix.reshape(rows, columns // taps, taps).transpose(1, 2).reshape(rows, columns)


def pack(weight: Tensor, kernel: Sequence[int], height: int, group: int, step: int,
         mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [c_out, c_in * r * s] (torch's order)."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    taps = kernel[0] * kernel[1]
    channels = weight.shape[1] // max(1, taps)
    if channels * taps != weight.shape[1] or max(kernel) > MAX_TAPS or channels // group > MAX_GROUPS or channels % group or step % group:
        wanted = f"a kernel of {kernel[0]} x {kernel[1]} in groups of {group} channels and steps of {step}"
        raise ValueError(f"a weight with {weight.shape[1]} columns cannot be packed for {wanted}")
    weight = weight.detach()
    mask = (weight != 0) if mask is None else mask.to(weight.device)
    values, (columns, step_ptr, order, live) = blocks.pack(channels_last(weight, kernel), height, step, channels_last(mask, kernel), group)
    first = columns[:, ::group].to(torch.int64)
    tap, channel = (first // channels, first % channels) if channels else (first, first)
    code = (tap // kernel[1]) << 24 | (tap % kernel[1]) << 16 | channel // group
    return values, [code.to(torch.int32), step_ptr, order, live]


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column, torch's order), rows * columns at padding."""
    code, step_ptr, order, live = index
    group, kernel_h, kernel_w = options[:3]
    taps = kernel_h * kernel_w
    channels = columns // taps
    code = code.to(torch.int64)
    tap = (code >> 24) * kernel_w + ((code >> 16) & 0xFF)
    channel = ((code & 0xFFFF) * group).unsqueeze(-1) + torch.arange(group, device=code.device)
    kept = (tap.unsqueeze(-1) * channels + channel).reshape(values.shape[:2])
    place = blocks.positions(values, [kept, step_ptr, order, live], rows, columns, ())
    row, column = place // max(1, columns), place % max(1, columns)
    ordered = row * columns + (column % max(1, channels)) * taps + column // max(1, channels)
    return torch.where(place < rows * columns, ordered, rows * columns)


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    group, kernel_h, kernel_w = options[:3]
    taps, step = kernel_h * kernel_w, values.shape[1]
    if group not in (1, *GROUPS) or step % group or not taps or columns % (taps * group):
        return f"groups of {group} channels and a kernel of {kernel_h} x {kernel_w} do not divide {columns} columns"
    wrong = blocks.blocks_fault(values, index, rows, (len(values), step // group))
    if wrong:
        return wrong
    code = index[0].to(torch.int64)
    return (inside("kept rows of the kernel", code >> 24, kernel_h) or inside("kept columns of the kernel", (code >> 16) & 0xFF, kernel_w)
            or inside("kept groups", code & 0xFFFF, columns // taps // group)
            or stored_once(positions(values, index, rows, columns, options), rows * columns))
