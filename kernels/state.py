"""Packed weights as tensors of a state_dict: the numbers of `layout`, reading it back, and fitting `values` to a data type.

    layout = [number of the format, rows, columns, kept, number of options, options ..., number of index tensors, kernel ...]

int64; kernel is (r, s) for a convolution and nothing for a matrix (nor in states written before it was stored).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import validity
from .formats import FORMATS, Packed, convolves

MOST_INDEX_TENSORS = 16
FIXED = 6


def layout(packed: Packed, kernel: Sequence[int], device: torch.device) -> Tensor:
    """The layout of a packed weight; `kernel` is () for a matrix."""
    numbers = [FORMATS.index(packed.format), packed.rows, packed.columns, packed.kept, len(packed.options), *packed.options,
               len(packed.index), *kernel]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def read(state: dict[str, Tensor], prefix: str) -> tuple[Packed, tuple[int, ...]] | None:
    """(packed weight in contiguous memory, kernel) stored under `prefix`; None where a tensor is missing (torch names it), ValueError with one sentence where
    the layout makes no sense."""
    stored, values = state.get(f"{prefix}layout"), state.get(f"{prefix}values")
    if stored is None or values is None:
        return None
    numbers = stored.tolist() if stored.dtype == torch.int64 and stored.ndim == 1 else []
    options = numbers[4] if len(numbers) >= FIXED else -1
    kernel = tuple(numbers[FIXED + options:]) if options >= 0 else ()
    count = numbers[FIXED + options - 1] if 0 <= options <= len(numbers) - FIXED else -1
    if not 0 <= count < MOST_INDEX_TENSORS or len(kernel) not in (0, 2) or not 0 <= numbers[0] < len(FORMATS):
        raise ValueError(f"{prefix}layout ({stored.dtype}, {list(stored.shape)}) holds no description of a packed weight")
    index = [state.get(f"{prefix}index{number}") for number in range(count)]
    if any(tensor is None for tensor in index):
        return None
    values, *index = (tensor.contiguous() for tensor in (values, *index))
    return Packed(FORMATS[numbers[0]], values, index, *numbers[1:4], tuple(numbers[5:5 + options]), 0), kernel


def refusal(packed: Packed, kernel: tuple[int, ...], prefix: str, rows: int, columns: int, wanted: tuple[int, ...]) -> str | None:
    """Why a stored weight does not belong into a layer of rows x columns with the kernel `wanted` (() for a matrix), or None."""
    if (packed.rows, packed.columns) != (rows, columns):
        return f"{prefix}layout holds a weight of {packed.rows} x {packed.columns}, but this layer has {rows} x {columns}"
    name = prefix[:-1] or "the layer"
    if wanted and not convolves(packed.format, wanted):
        return f"{name} holds a weight of the format {packed.format}, which has no convolution of more than 1 x 1, but this layer is one"
    if wrong := validity.fault(packed):
        return f"{name} holds no packed weight of the format {packed.format}: {wrong}"
    if packed.format == "sparse_conv":
        taps = tuple(packed.options[1:3])
        kernel = taps if kernel or wanted or taps != (1, 1) else ()
    if kernel and kernel != wanted:
        own = "this layer multiplies by a matrix" if not wanted else f"the kernel of this layer is {wanted[0]} x {wanted[1]}"
        return f"{prefix}layout holds a convolution of {kernel[0]} x {kernel[1]}, but {own}"
    return None


def relayout(packed: Packed, before: torch.dtype, after: torch.dtype) -> Tensor:
    """`packed.values`, laid out for numbers of `before`, in the order that numbers of `after` have, contiguous."""
    reference = importlib.import_module(f".{packed.format}.reference", __package__)
    if before.itemsize == after.itemsize or not hasattr(reference, "relayout"):
        return packed.values.contiguous()
    return reference.relayout(packed.values, packed.index, before, after)
