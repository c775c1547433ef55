"""The two_four format in plain torch: W = S + R, exactly, with at most two entries of S in every four consecutive columns.

S takes the two kept entries of largest magnitude of every four, R (few entries) is stored as run16 bytes.

    values [entries of R's run16 values + rows * columns / 2]   R's values (64-bit aligned in this order), then S row by row
    index:
      choice [rows, columns / 2]  int8: column inside its four, 4 where nothing is stored
      start, gaps, perm, slice_ptr, live                        R, as in run16
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import shapes

from ..run16 import reference as run16

OPTIONS = 1


def choose(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(S's columns inside their four [rows, columns / 4, 2] ascending, and whether each of them is kept)."""
    rows, columns = weight.shape
    fours = mask.view(rows, columns // 4, 4)
    rank = torch.where(fours, weight.abs().view_as(fours), torch.full_like(weight, -1.0).view_as(fours))
    picked = rank.topk(2, dim=-1).indices.sort(-1).values
    return picked, fours.gather(-1, picked)


def pack(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [rows, columns]; the columns must be a multiple of 4."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    rows, columns = weight.shape
    if columns % 4:
        raise ValueError(f"the weight has {columns} columns, but 2:4 sparsity needs a multiple of 4")
    weight = weight.detach()
    mask = (weight != 0) if mask is None else mask.to(weight.device)
    picked, kept = choose(weight, mask)
    chosen = weight.view(rows, columns // 4, 4).gather(-1, picked)
    chosen = torch.where(kept, chosen, torch.zeros_like(chosen))
    in_s = torch.zeros(rows, columns // 4, 4, dtype=torch.bool, device=weight.device).scatter(-1, picked, kept).view(rows, columns)
    remainder, index = run16.pack(weight, run16.BYTE, mask & ~in_s)
    choice = torch.where(kept, picked, torch.full_like(picked, 4)).to(torch.int8).view(rows, columns // 2)
    return torch.cat([remainder.reshape(-1), chosen.reshape(-1)]), [choice, *index]


def parts(values: Tensor, index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(S's values [rows, columns / 2], R's values in run16 layout)."""
    choice, start = index[0], index[1]
    planes = run16.planes(values.dtype)
    r, s = values.split([values.numel() - choice.numel(), choice.numel()])
    return s.view(choice.shape), r.view(start.shape[0], planes, run16.LANES, run16.RUN // planes)


def relayout(values: Tensor, index: Sequence[Tensor], before: torch.dtype, after: torch.dtype) -> Tensor:
    """`values` laid out for numbers of `before` in the order that numbers of `after` have; their own data type does not matter."""
    count = index[0].numel()
    r, s = values.split([values.numel() - count, count])
    return torch.cat([run16.relayout(r, index[1:], before, after).reshape(-1), s])


def positions_of_s(choice: Tensor, rows: int, columns: int) -> Tensor:
    """Place of every element of S, rows * columns where nothing is stored."""
    four = torch.arange(choice.shape[1], device=choice.device) // 2
    column = four * 4 + choice.to(torch.int64)
    row = torch.arange(rows, device=choice.device).unsqueeze(1)
    return torch.where(choice < 4, row * columns + column, rows * columns)


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column), rows * columns where nothing is stored."""
    _, remainder = parts(values, index)
    places = run16.positions(remainder, index[1:], rows, columns, ())
    return torch.cat([places.reshape(-1), positions_of_s(index[0], rows, columns).reshape(-1)])


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    if columns % 4 or not index:
        return f"{columns} columns are no multiple of 4" if columns % 4 else "it has no index tensors"
    choice = index[0]
    wrong = shapes([choice], [("choice", (torch.int8,), (rows, columns // 2))])
    if wrong:
        return wrong
    first, second = choice.view(rows, columns // 4, 2).unbind(-1)
    if choice.numel() and (int(choice.min()) < 0 or int(choice.max()) > 4 or ((first >= second) & (first < 4) & (second < 4)).any()):
        return "'choice' does not name two different columns of every four"
    remainder = parts(values, index)[1]
    return run16.fault(remainder, index[1:], rows, columns, (*options, 0, 0))
