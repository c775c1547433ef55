"""The operator `compress_kernels::compact_linear` and the packing that feeds it.

options = (words per step, warps), 0 meaning the default.
"""

from __future__ import annotations

from torch import Tensor

from .. import operator
from ..formats import Packed
from . import reference


def _launch(*args) -> Tensor:
    from .triton import launch

    return launch(*args)


compact_linear = operator.define_linear("compact_linear", reference.positions, _launch)


def pack(weight: Tensor, mask: Tensor | None = None, words: int = 0, warps: int = 0) -> Packed:
    """Packs `weight` [c_out, c_in]."""
    values, index = reference.pack(weight, mask)
    bytes_ = sum(t.numel() * t.element_size() for t in (values, *index))
    return Packed("compact", values, index, weight.shape[0], weight.shape[1], values.numel(), (words, warps), bytes_)
