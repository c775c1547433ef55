"""Whether a packed weight that came from outside (a file) is one: kernels follow its integers without looking.

`fault(packed)` asks the format's `reference.fault`. All tests are exact: data that passes makes no kernel read or write outside its buffers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import FORMATS, Packed

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Expected = Sequence[tuple[str, tuple[torch.dtype, ...], Sequence[int]]]


def fault(packed: Packed) -> str | None:
    """What is wrong with `packed`, or None."""
    if packed.format not in FORMATS or min(packed.rows, packed.columns, packed.kept) < 0 or any(option < 0 for option in packed.options):
        return "its numbers belong to no format"
    reference = importlib.import_module(f".{packed.format}.reference", __package__)
    if len(packed.options) != reference.OPTIONS:
        return f"it has {len(packed.options)} options, but the format {packed.format} has {reference.OPTIONS}"
    try:
        return reference.fault(packed.values, packed.index, packed.rows, packed.columns, packed.options)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # tensors of a wrong rank, found at the first look at them
        return f"its tensors do not fit together ({str(error).splitlines()[0]})"


def shapes(index: Sequence[Tensor], expected: Expected) -> str | None:
    """The first tensor whose dtype or shape is not the expected one; -1 stands for any size."""
    if len(index) != len(expected):
        return f"it has {len(index)} index tensors, but {len(expected)} are needed"
    for tensor, (name, dtypes, shape) in zip(index, expected, strict=True):
        fits = tensor.ndim == len(shape) and all(want in (-1, have) for have, want in zip(tensor.shape, shape, strict=True))
        if tensor.dtype not in dtypes or not fits:
            return f"'{name}' is {tensor.dtype} {list(tensor.shape)}, but {' or '.join(map(str, dtypes))} {list(shape)} is needed"
    return None


def pointers(name: str, tensor: Tensor, end: int) -> str | None:
    """Whether `tensor` rises from 0 to `end`."""
    wide = tensor.to(torch.int64)
    rising = wide.numel() > 0 and int(wide[0]) == 0 and int(wide[-1]) == end and bool((wide.diff() >= 0).all())
    return None if rising else f"'{name}' does not rise from 0 to {end}"


def inside(name: str, tensor: Tensor, end: int) -> str | None:
    """Whether every entry lies in [0, end)."""
    good = tensor.numel() == 0 or (int(tensor.min()) >= 0 and int(tensor.max()) < end)
    return None if good else f"'{name}' points outside of [0, {end})"


def permutation(name: str, tensor: Tensor, size: int) -> str | None:
    """Whether `tensor` holds each of 0 .. size - 1 once."""
    good = tensor.numel() == size and torch.equal(tensor.to(torch.int64).sort().values, torch.arange(size, device=tensor.device))
    return None if good else f"'{name}' does not hold each of 0 .. {size - 1} once"


def stored_once(places: Tensor, end: int) -> str | None:
    """Whether places lie in [0, end], and those below `end` differ."""
    if wrong := inside("the stored entries", places, end + 1):
        return wrong
    used = places[places < end]
    return None if used.unique().numel() == used.numel() else "it stores a weight twice"
