"""Sparse kernels for pruned Linear and Conv2d layers, and `sparsify`, which uses them wherever they were measured faster.

    SparseLinear, SparseConv2d   modules that hold a packed weight
    sparsify(model, inputs)      swaps masked layers for sparse ones where that is faster on this device

Importing this package needs neither Triton nor a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modules import SparseConv2d, SparseLinear
    from .choose import sparsify

__all__ = ["SparseConv2d", "SparseLinear", "sparsify"]
_HOME = {"SparseConv2d": "modules", "SparseLinear": "modules"}


def __getattr__(name: str):
    """Loads the modules (and torch) on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f".{_HOME.get(name, 'choose')}", __name__), name)
    globals()[name] = found
    return found
