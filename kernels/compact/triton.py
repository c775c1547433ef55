"""Triton kernel that expands the compact format (reference.py) into the dense weight.

One program owns one row. A step takes WORDS bitmap words; the place of a value is the row's start, plus the bits in earlier words,
plus the bits below its own in its word. Bits are counted with integer arithmetic that compiles to one population count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import epilogue

CONFIGS = tuple({"words": words, "warps": warps} for words in (16, 32) for warps in (2, 4))


@triton.jit
def _count(bits):
    """Set bits of every uint32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def compact_decode_kernel(values, bitmap, row_ptr, y, columns, words, WORDS: tl.constexpr):
    """Grid (rows,). y: [rows, columns], the data type of `values`; bitmap: [rows, words]."""
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(row_ptr + row)
    bit = tl.arange(0, 32)
    below = (tl.full([32], 1, tl.uint32) << bit.to(tl.uint32)) - 1
    bitmap += row * words
    y += row * columns
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        bits = tl.load(bitmap + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
        counts = _count(bits)
        before = tl.cumsum(counts, 0) - counts
        here = _count(bits[:, None] & below[None, :])
        kept = ((bits[:, None] >> bit.to(tl.uint32)[None, :]) & 1) != 0
        value = tl.load(values + base + (before[:, None] + here), mask=kept, other=0.0)
        column = word[:, None] * 32 + bit[None, :]
        tl.store(y + column, value, mask=column < columns)
        base += tl.sum(counts, 0)


def decode(values: Tensor, index, rows: int, columns: int, options, y: Tensor | None = None) -> Tensor:
    """The dense weight [rows, columns]; `options` is (words per step, warps), 0 meaning the default."""
    bitmap, row_ptr = index
    y = values.new_empty(rows, columns) if y is None else y
    with torch.cuda.device_of(values):
        compact_decode_kernel[(rows,)](values, bitmap, row_ptr, y, columns, bitmap.shape[1], WORDS=options[0] or 32, num_warps=options[1] or 4)
    return y


def launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str) -> Tensor:
    """y [N, rows] for x [N, columns]: decode, then the library's dense product."""
    product = torch.nn.functional.linear(x, decode(values.detach(), index, rows, columns, options), bias if scale is None else None)
    return epilogue.finish(product, scale, None if scale is None else bias, residual, activation)
