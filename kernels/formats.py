"""A packed weight as plain data, and the table of formats.

Every format is a folder with `op.py`, which offers `pack(weight, mask=None, **options) -> Packed` and the torch operator
`compress_kernels::<name>_linear` (`sparse_conv` and `csr` also have `<name>_conv2d`; the others convolve with 1 x 1 only, as a matrix).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

FORMATS = ("run16", "vector_block", "sparse_conv", "two_four", "compact", "csr")
CONVOLUTIONS = ("sparse_conv", "csr")


@dataclass
class Packed:
    """values: float tensor in the layout that the kernel streams, trainable; index: integer tensors; rows x columns the dense shape;
    kept: stored weights without padding; options: static integers of the format; bytes: read from memory by one forward pass."""

    format: str
    values: Tensor
    index: list[Tensor]
    rows: int
    columns: int
    kept: int
    options: tuple[int, ...]
    bytes: int


def module_of(name: str) -> ModuleType:
    """The `op` module of a format; ValueError for an unknown name."""
    if name not in FORMATS:
        raise ValueError(f"the sparse format {name!r} is not one of {', '.join(FORMATS)}")
    return importlib.import_module(f".{name}.op", __package__)


def linear_operator(name: str) -> Callable[..., Tensor]:
    """The torch operator that multiplies by a packed matrix; schema operator.LINEAR_SCHEMA."""
    return getattr(module_of(name), f"{name}_linear")


def convolves(name: str, kernel: Sequence[int]) -> bool:
    """Whether a weight in that format can convolve with that kernel."""
    return name in CONVOLUTIONS or tuple(kernel) == (1, 1)


def conv_operator(name: str) -> Callable[..., Tensor]:
    """The torch operator that convolves with a packed weight; schema convolution.SCHEMA."""
    return getattr(module_of(name), f"{name}_conv2d")


def pack(name: str, weight: Tensor, mask: Tensor | None = None, **options) -> Packed:
    """Packs the matrix `weight` [c_out, c_in] in the format `name`."""
    return module_of(name).pack(weight, mask, **options)


def positions(packed: Packed) -> Tensor:
    """Place of every element of `packed.values` in the dense weight, rows * columns at padding."""
    reference = importlib.import_module(f".{packed.format}.reference", __package__)
    return reference.positions(packed.values, packed.index, packed.rows, packed.columns, packed.options)


def unpack(packed: Packed) -> Tensor:
    """The dense weight [rows, columns], bit for bit what was packed."""
    from .operator import decode

    return decode(packed.values, positions(packed), packed.rows, packed.columns)
