"""The RUN16 format in plain torch: packing, positions and the product.

A run is 16 consecutive stored entries of one row. Rows are sorted by their number of runs and 32 rows form a slice; a slice has as many
runs as its longest row. With R runs in all slices together and P = 16 / (entries per 64-bit word) value planes:

    values [R, P, 32, 16 / P]  entry e of a run lies in plane e // (16 / P); one row of the slice per lane (4 planes, 8 for float32)
    index:
      start [R, 32]      int16 (uint16 bits) or int32: column of the run's first entry
      gaps  [R, 1, 32]   int64, 16 nibbles: distance from the previous entry; or
            [R, 2, 32]   int64, 16 bytes: distance from the run's start
      perm  [32 S]       int32: output row of each lane, `rows` or more where there is none
      slice_ptr [S + 1]  int32: first run of each slice
      live  [R, 32]      int16, bit e set where entry e is a weight (not padding, not a filler); the forward kernel never reads it

A nibble holds at most 15: a longer distance inserts fillers with value zero. A byte run is closed early when its span would exceed 255.
Padding repeats the last column, so that no load leaves the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validity import FLOATS, inside, permutation, pointers, shapes, stored_once

OPTIONS = 3
RUN, LANES = 16, 32
NIBBLE, BYTE = 0, 1
MAX_GAP = 15
MAX_SPAN = 255
MAX_COLUMNS = 2**31 - 1


def planes(dtype: torch.dtype) -> int:
    """Value planes of 64-bit words per run: 4 for 16-bit values, 8 for float32."""
    return RUN * dtype.itemsize // 8


def _entries(mask: Tensor, coding: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored entries in row order: (row, column, source, run within the row); source -1 marks a filler."""
    row, column = mask.nonzero(as_tuple=True)
    source = torch.arange(row.numel(), device=mask.device)
    if coding == NIBBLE and row.numel():
        gap = column.diff(prepend=column[:1])
        follows = row.diff(prepend=row[:1] - 1) == 0
        extra = torch.where(follows, (gap - 1).clamp(min=0) // MAX_GAP, 0)
        ends = (extra + 1).cumsum(0)
        owner = torch.repeat_interleave(source, extra + 1)
        missing = ends[owner] - 1 - torch.arange(owner.numel(), device=mask.device)
        row, column = row[owner], column[owner] - missing * MAX_GAP
        source = torch.where(missing == 0, owner, -1)
    if row.numel() == 0:
        return row, column, source, row
    counts = torch.bincount(row, minlength=mask.shape[0])
    first = counts.cumsum(0) - counts
    place = torch.arange(row.numel(), device=mask.device) - first[row]
    if coding == NIBBLE:
        return row, column, source, place // RUN
    return row, column, source, _byte_runs(row, column, place)


def _byte_runs(row: Tensor, column: Tensor, place: Tensor) -> Tensor:
    """Greedy runs of at most 16 entries and a span of at most 255; all rows advance together, one run per step."""
    total = row.numel()
    run = torch.empty_like(row)
    key = row * (int(column.max()) + MAX_SPAN + 2) + column
    head = (place == 0).nonzero().reshape(-1)
    stop = torch.cat([head[1:], head.new_tensor([total])])
    number = 0
    while head.numel():
        end = torch.searchsorted(key, key[head] + MAX_SPAN, right=True)
        end = torch.minimum(torch.minimum(end, head + RUN), stop)
        run[torch.repeat_interleave(end - (end - head), end - head) + _within(end - head)] = number
        more = end < stop
        head, stop, number = end[more], stop[more], number + 1
    return run


def _within(lengths: Tensor) -> Tensor:
    """0..length-1 for each length, concatenated."""
    start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(int(lengths.sum()), device=lengths.device) - start


def pack(weight: Tensor, coding: int, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(values, index) of `weight` [rows, columns]; `mask` (bool, same shape) keeps entries that are zero by value, default weight != 0.

    `coding` is NIBBLE (cheapest below about 85 % sparsity) or BYTE. Packing is done on the weight's device.
    """
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, but the weight has shape {list(weight.shape)}")
    rows, columns = weight.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"the weight has {columns} columns, but run16 stores columns as 32-bit integers")
    weight, device = weight.detach(), weight.device
    row, column, source, run = _entries(weight != 0 if mask is None else mask.to(device), coding)
    runs = torch.zeros(rows, dtype=torch.int64, device=device)
    if row.numel():
        runs.scatter_reduce_(0, row, run + 1, "amax")
    slices = -(-rows // LANES)
    order = torch.argsort(runs, descending=True, stable=True)
    perm = torch.full((slices * LANES,), rows, dtype=torch.int32, device=device)
    perm[:rows] = order.to(torch.int32)
    longest = runs[order[::LANES]] if rows else runs
    slice_ptr = torch.cat([longest.new_zeros(1), longest.cumsum(0)])
    total = int(slice_ptr[-1])

    lane = torch.empty_like(order)
    lane[order] = torch.arange(rows, device=device)
    group = slice_ptr[lane[row] // LANES] + run if row.numel() else row
    within = _place_in_run(row, run)
    spot = (group * LANES + lane[row] % LANES) * RUN + within
    columns_at = torch.zeros(total * LANES * RUN, dtype=torch.int64, device=device)
    columns_at[spot] = column
    columns_at = columns_at.view(-1, RUN).cummax(1).values.view(total, LANES, RUN)
    real = source >= 0
    live = torch.zeros(columns_at.numel(), dtype=torch.bool, device=device)
    live[spot[real]] = True
    values = weight.new_zeros(total * LANES * RUN)
    values[spot[real]] = weight[row[real], column[real]]

    start = columns_at[..., 0] if total else columns_at.new_zeros(0, LANES)
    width = 4 if coding == NIBBLE else 8
    steps = columns_at.diff(dim=-1, prepend=columns_at[..., :1]) if coding == NIBBLE else columns_at - columns_at[..., :1]
    steps = steps.reshape(total, LANES, width // 4, 64 // width)
    gaps = (steps << (width * torch.arange(64 // width, device=device))).sum(-1).permute(0, 2, 1).contiguous()
    bits = (live.view(total, LANES, RUN).to(torch.int32) << torch.arange(RUN, dtype=torch.int32, device=device)).sum(-1).to(torch.int16)
    p = planes(weight.dtype)
    values = values.view(total, LANES, p, RUN // p).permute(0, 2, 1, 3).contiguous()
    start = start.to(torch.int32 if columns > 65536 else torch.int16)
    return values, [start, gaps, perm, slice_ptr.to(torch.int32), bits]


def _place_in_run(row: Tensor, run: Tensor) -> Tensor:
    if row.numel() == 0:
        return row
    new = (row.diff(prepend=row[:1] - 1) != 0) | (run.diff(prepend=run[:1]) != 0)
    here = torch.arange(row.numel(), device=row.device)
    return here - torch.where(new, here, 0).cummax(0).values


def columns_of(index: Sequence[Tensor]) -> Tensor:
    """Column of every entry, [R, 32, 16] int64."""
    start, gaps = index[0], index[1]
    first = start.to(torch.int64)
    if start.dtype == torch.int16:
        first = first & 0xFFFF
    width = 4 if gaps.shape[1] == 1 else 8
    shifts = width * torch.arange(64 // width, device=gaps.device)
    steps = (gaps.permute(0, 2, 1).unsqueeze(-1) >> shifts) & (2**width - 1)
    steps = steps.reshape(*start.shape, RUN)
    return first.unsqueeze(-1) + (steps.cumsum(-1) if width == 4 else steps)


def positions(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> Tensor:
    """Place of every element of `values` in the dense weight (row * columns + column), rows * columns where nothing is stored."""
    start, _, perm, slice_ptr, live = index
    runs = torch.arange(start.shape[0], device=start.device)
    owner = torch.bucketize(runs, slice_ptr[1:].to(torch.int64), right=True)
    row = perm.view(-1, LANES)[owner].to(torch.int64)
    stored = ((live.to(torch.int32).unsqueeze(-1) >> torch.arange(RUN, dtype=torch.int32, device=live.device)) & 1).bool()
    place = torch.where(stored, row.unsqueeze(-1) * columns + columns_of(index), rows * columns)
    p = values.shape[1]
    return place.view(-1, LANES, p, RUN // p).permute(0, 2, 1, 3)


def relayout(values: Tensor, index: Sequence[Tensor], before: torch.dtype, after: torch.dtype) -> Tensor:
    """`values` laid out for numbers of `before` in the order that numbers of `after` have; their own data type does not matter."""
    p, q = planes(before), planes(after)
    runs = values.reshape(-1, p, LANES, RUN // p).permute(0, 2, 1, 3).reshape(-1, LANES, q, RUN // q)
    return runs.permute(0, 2, 1, 3).contiguous()


def stored_bytes(values: Tensor, index: Sequence[Tensor]) -> int:
    """Bytes that one forward pass reads from the packed weight."""
    return sum(t.numel() * t.element_size() for t in (values, *index[:4]))


def fault(values: Tensor, index: Sequence[Tensor], rows: int, columns: int, options: Sequence[int]) -> str | None:
    """What is wrong with tensors that are said to be of this format, or None; see `kernels.validity`."""
    p, slices = planes(values.dtype), -(-rows // LANES)
    wrong = shapes([values, *index], [
        ("values", FLOATS, (-1, p, LANES, RUN // p)), ("start", (torch.int32 if columns > 65536 else torch.int16,), (len(values), LANES)),
        ("gaps", (torch.int64,), (len(values), 1 + options[0], LANES)), ("perm", (torch.int32,), (slices * LANES,)),
        ("slice_ptr", (torch.int32,), (slices + 1,)), ("live", (torch.int16,), (len(values), LANES))])
    if wrong or options[0] not in (NIBBLE, BYTE):
        return wrong or f"its coding is {options[0]}, but {NIBBLE} or {BYTE} is needed"
    perm = index[2]
    return (pointers("slice_ptr", index[3], len(values)) or inside("perm", perm, 2**31) or permutation("perm", perm[perm < rows], rows)
            or inside("the columns", columns_of(index), columns) or stored_once(positions(values, index, rows, columns, options), rows * columns))
