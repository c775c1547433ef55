"""Compressed sparse rows (CSR) in plain torch.

    values [nnz]   row by row, columns ascending
    index: crow [rows + 1] int32, col [nnz] int32, or int16 for the compiled engine where the matrix has at most 32,768 columns
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import FLOATS, inside, pointers, shapes

OPTIONS = 1
ENGINES = ("torch", "scipy", "compiled")


def pack(weight: Tensor, mask: Tensor | None = None, narrow: bool = False) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [rows, columns]; `mask` (bool, same shape) keeps entries that are zero by value. With `narrow`, columns are
    stored in 16 bits if they fit."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    weight = weight.detach()
    mask = (weight != 0) if mask is None else mask.to(weight.device)
    row, col = mask.nonzero(as_tuple=True)
    if row.numel() >= 2**31:
        raise ValueError(f"the weight keeps {row.numel()} entries, but csr stores at most {2**31 - 1}")
    if weight.shape[1] >= 2**31:
        raise ValueError(f"the weight has {weight.shape[1]} columns, but csr numbers at most {2**31 - 1}")
    counts = torch.bincount(row, minlength=weight.shape[0])
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    short = narrow and weight.shape[1] <= 2**15
    return weight[row, col], [crow.to(torch.int32), col.to(torch.int16 if short else torch.int32)]


def rows_of(crow: Tensor, count: int) -> Tensor:
    """Row of each of the `count` entries, int64."""
    return torch.bucketize(torch.arange(count, device=crow.device), crow[1:].to(torch.int64), right=True)


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column); there is no padding."""
    crow, col = index
    return rows_of(crow, values.shape[0]) * columns + col.to(torch.int64)


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    nnz = values.numel()
    return (shapes([values, *index], [("values", FLOATS, (nnz,)), ("crow", (torch.int32,), (rows + 1,)), ("col", (torch.int16, torch.int32), (nnz,))])
            or pointers("crow", index[0], nnz) or inside("col", index[1], columns)
            or (None if options[0] < len(ENGINES) else f"its engine is {options[0]}, but one of 0 to {len(ENGINES) - 1} is needed"))
