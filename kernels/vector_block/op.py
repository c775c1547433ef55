"""The operator `compress_kernels::vector_block_linear` and the packing that feeds it.

options = (width, splits, warps): columns of x per program, shares per block, warps; 0 means the kernel's own choice.
"""

from __future__ import annotations

from torch import Tensor

from .. import operator
from ..formats import Packed
from . import reference


def _launch(*args) -> Tensor:
    from .triton import launch

    return launch(*args)


vector_block_linear = operator.define_linear("vector_block_linear", reference.positions, _launch)


def pack(weight: Tensor, mask: Tensor | None = None, height: int = 64, step: int = 0, width: int = 0, splits: int = 0,
         warps: int = 0) -> Packed:
    """Packs `weight` [c_out, c_in] into blocks of `height` rows; `step` kept columns are multiplied at a time (default 64, 32 for
    float32)."""
    step = step or (64 if weight.element_size() == 2 else 32)
    values, index = reference.pack(weight, height, step, mask)
    kept = int((weight != 0).sum() if mask is None else mask.sum())
    bytes_ = reference.stored_bytes(values, index)
    return Packed("vector_block", values, index, weight.shape[0], weight.shape[1], kept, (width, splits, warps), bytes_)
