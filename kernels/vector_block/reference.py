"""The vector-block format in plain torch: V consecutive output rows share the list of input columns they keep.

Block b holds the columns in which any of its V rows has a kept weight, padded to a multiple of `step` with column 0 and zero values.
With T steps in all B = ceil(rows / V) blocks together:

    values [T, step, V]         dense panels, a whole step contiguous
    index:
      kept [T, step]            int32: input column of each panel row
      step_ptr [B + 1]          int32: first step of each block
      order [B]                 int32: blocks with most steps first (the order in which programs start)
      live [T, step, ceil(V/32)] int32: bit v % 32 of word v // 32 set where the weight is kept; the forward kernel never reads it

Block-sparse (BSR) weights are the case where kept columns come in consecutive groups. Any other mask is stored correctly, too; it only
saves nothing where no column of a block is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import FLOATS, inside, permutation, pointers, shapes, stored_once

OPTIONS = 3
BITS = 32


def pack(weight: Tensor, height: int, step: int, mask: Tensor | None = None, group: int = 1) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [rows, columns] with V = `height` (a power of two, 16 or more) and `step` columns per step.

    `mask` (bool, same shape) keeps entries that are zero by value, default weight != 0. `group` consecutive columns (a divisor of
    `columns` and `step`) are kept or dropped together.
    """
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    for name, size in (("height", height), ("step", step)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"the block {name} is {size}, but it must be a power of two of at least 16")
    rows, columns = weight.shape
    weight = weight.detach()
    mask = (weight != 0) if mask is None else mask.to(weight.device)
    blocks = -(-rows // height)
    padded = weight.new_zeros(blocks * height, columns)
    padded[:rows] = torch.where(mask, weight, torch.zeros_like(weight))
    alive = torch.zeros(blocks * height, columns, dtype=torch.bool, device=weight.device)
    alive[:rows] = mask
    padded, alive = padded.view(blocks, height, columns), alive.view(blocks, height, columns)
    vectors = alive.any(1).view(blocks, columns // group, group).any(2).repeat_interleave(group, 1)
    block, column = vectors.nonzero(as_tuple=True)
    counts = torch.bincount(block, minlength=blocks)
    steps = -(-counts // step)
    step_ptr = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    first = counts.cumsum(0) - counts
    spot = step_ptr[block] * step + torch.arange(block.numel(), device=block.device) - first[block]
    total = int(step_ptr[-1])
    kept = torch.zeros(total * step, dtype=torch.int32, device=weight.device)
    kept[spot] = column.to(torch.int32)
    values = weight.new_zeros(total * step, height)
    values[spot] = padded[block, :, column]
    words = -(-height // BITS)
    bits = torch.zeros(total * step, words * BITS, dtype=torch.int64, device=weight.device)
    bits[spot, :height] = alive[block, :, column].to(torch.int64)
    live = (bits.view(total, step, words, BITS) << torch.arange(BITS, device=weight.device)).sum(-1)
    order = torch.argsort(steps, descending=True, stable=True)
    index = [kept.view(total, step), step_ptr.to(torch.int32), order.to(torch.int32), live.to(torch.int32)]
    return values.view(total, step, height), index


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column), rows * columns where nothing is stored."""
    kept, step_ptr, _, live = index
    total, step, height = values.shape
    owner = torch.bucketize(torch.arange(total, device=kept.device), step_ptr[1:].to(torch.int64), right=True)
    row = owner.view(-1, 1, 1) * height + torch.arange(height, device=kept.device)
    lane = torch.arange(height, device=kept.device)
    stored = ((live[..., lane // BITS] >> (lane % BITS).to(torch.int32)) & 1).bool()
    return torch.where(stored, row * columns + kept.to(torch.int64).unsqueeze(-1), rows * columns)


def kept_columns(mask: Tensor, height: int, group: int = 1) -> float:
    """Fraction of (block, group of columns) panels that hold at least one kept weight: what the format streams, relative to dense."""
    rows, columns = mask.shape
    blocks = -(-rows // height)
    padded = torch.zeros(blocks * height, columns, dtype=torch.bool, device=mask.device)
    padded[:rows] = mask
    vectors = padded.view(blocks, height, columns // group, group).any(3).any(1)
    return float(vectors.sum()) / max(1, vectors.numel())


def stored_bytes(values: Tensor, index: Sequence[Tensor]) -> int:
    """Bytes that one forward pass reads from the packed weight."""
    return sum(t.numel() * t.element_size() for t in (values, *index[:3]))


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    return (blocks_fault(values, index, rows, (len(values), values.shape[1])) or inside("kept", index[0], columns)
            or stored_once(positions(values, index, rows, columns, options), rows * columns))


def blocks_fault(values: Tensor, index: Sequence[Tensor], rows: int, kept: tuple[int, int]) -> str | None:
    """What is wrong with the panels of a vector-block format whose list of columns has the shape `kept`."""
    total, step, height = values.shape
    if any(size < 16 or size & (size - 1) for size in (step, height)):
        return f"its blocks of {height} rows and {step} columns are no powers of two of at least 16"
    blocks = -(-rows // height)
    return (shapes([values, *index], [("values", FLOATS, (total, step, height)), ("kept", (torch.int32,), kept),
                                      ("step_ptr", (torch.int32,), (blocks + 1,)), ("order", (torch.int32,), (blocks,)),
                                      ("live", (torch.int32,), (total, step, -(-height // BITS)))])
            or pointers("step_ptr", index[1], total) or permutation("order", index[2], blocks))
