"""The compact format in plain torch: one bit per weight position and the kept values, row by row.

    values [nnz]
    index: bitmap [rows, ceil(columns / 32)] int32, bit c % 32 of word c // 32; row_ptr [rows + 1] int64, first value of each row
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import FLOATS, pointers, shapes

OPTIONS = 2
BITS = 32


def pack(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [rows, columns]; `mask` (bool, same shape) keeps entries that are zero by value."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    rows, columns = weight.shape
    weight = weight.detach()
    mask = (weight != 0) if mask is None else mask.to(weight.device)
    words = -(-columns // BITS)
    padded = torch.zeros(rows, words * BITS, dtype=torch.int64, device=weight.device)
    padded[:, :columns] = mask
    bitmap = (padded.view(rows, words, BITS) << torch.arange(BITS, device=weight.device)).sum(-1)
    counts = mask.sum(1)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return weight[mask], [bitmap.to(torch.int32), row_ptr]


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column); there is no padding."""
    bitmap = index[0]
    bits = (bitmap.unsqueeze(-1) >> torch.arange(BITS, dtype=torch.int32, device=bitmap.device)) & 1
    kept = bits.view(rows, bitmap.shape[1] * BITS)[:, :columns].reshape(-1)
    rank = torch.arange(1, values.shape[0] + 1, device=bitmap.device)
    return torch.searchsorted(kept.cumsum(0), rank)


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    words = -(-columns // BITS)
    wrong = shapes([values, *index], [("values", FLOATS, (-1,)), ("bitmap", (torch.int32,), (rows, words)), ("row_ptr", (torch.int64,), (rows + 1,))])
    if wrong:
        return wrong
    bitmap, row_ptr = index
    bits = ((bitmap.unsqueeze(-1) >> torch.arange(BITS, dtype=torch.int32, device=bitmap.device)) & 1).view(rows, words * BITS)
    if bits[:, columns:].any() or not torch.equal(bits.sum(1), row_ptr.diff()):
        return "'bitmap' and 'row_ptr' do not count the same weights"
    return pointers("row_ptr", row_ptr, values.numel())
