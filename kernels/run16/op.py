"""The operator `compress_kernels::run16_linear` and the packing that feeds it.

options = (coding, warps, splits): coding is reference.NIBBLE or BYTE; 0 warps or splits means the kernel's own choice.
"""

from __future__ import annotations

from torch import Tensor

from .. import operator
from ..formats import Packed
from . import reference


def _launch(*args) -> Tensor:
    from .triton import launch

    return launch(*args)


run16_linear = operator.define_linear("run16_linear", reference.positions, _launch)


def pack(weight: Tensor, mask: Tensor | None = None, coding: int | None = None, warps: int = 0, splits: int = 0) -> Packed:
    """Packs `weight` [c_out, c_in]; without `coding` the smaller one for its density is taken (nibbles below 85 % sparsity)."""
    kept = int((weight != 0).sum() if mask is None else mask.sum())
    if coding is None:
        coding = reference.NIBBLE if kept > 0.15 * weight.numel() else reference.BYTE
    values, index = reference.pack(weight, coding, mask)
    return Packed("run16", values, index, weight.shape[0], weight.shape[1], kept, (coding, warps, splits),
                  reference.stored_bytes(values, index))
