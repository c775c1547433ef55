"""The operator `compress_kernels::compact_linear` and the packing that feeds it.

options = (words per step, warps), 0 meaning the default.
"""

from __future__ import annotations

from torch import Tensor

from .. import epilogue, operator
from ..formats import Packed
from . import reference


def _launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str) -> Tensor:
    from .triton import decode, launch

    dtype = operator.wide(x.dtype, scale)
    if dtype == x.dtype:
        return launch(x, values, index, scale, bias, residual, rows, columns, options, activation)
    product = x.to(dtype) @ decode(values.detach(), index, rows, columns, options).to(dtype).t()
    return epilogue.finish(product, scale, bias, residual, activation).to(x.dtype)


compact_linear = operator.define_linear("compact_linear", reference.positions, _launch)


def pack(weight: Tensor, mask: Tensor | None = None, words: int = 0, warps: int = 0) -> Packed:
    """Packs `weight` [c_out, c_in]."""
    values, index = reference.pack(weight, mask)
    bytes_ = sum(t.numel() * t.element_size() for t in (values, *index))
    return Packed("compact", values, index, weight.shape[0], weight.shape[1], values.numel(), (words, warps), bytes_)
