"""Random matrices with the zero patterns that formats trip over."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("random", "random", "empty_rows", "empty_columns", "dense_rows", "skewed", "blocks", "far")
SPARSITIES = (0.5, 0.9, 0.0, 0.99, 1.0, 0.7)


def masked(rows: int, columns: int, sparsity: float, pattern: str, generator: torch.Generator, height: int = 16) -> Tensor:
    """float32 [rows, columns] with about that sparsity; `blocks` zeroes whole vectors of `height` rows, `far` leaves gaps of hundreds."""
    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    keep = draw(rows, columns) >= sparsity
    if pattern == "empty_rows":
        keep &= (draw(rows) > 0.5).unsqueeze(1)
    elif pattern == "empty_columns":
        keep &= draw(columns) > 0.5
    elif pattern == "dense_rows":
        keep |= (draw(rows) > 0.8).unsqueeze(1)
    elif pattern == "skewed":
        keep = draw(rows, columns) >= torch.linspace(0, 1, rows).unsqueeze(1)
    elif pattern == "blocks":
        keep = (draw(-(-rows // height), columns) >= sparsity).repeat_interleave(height, 0)[:rows]
    elif pattern == "far":
        keep = (torch.arange(columns) % 301 == 3).expand(rows, columns) & (draw(rows, 1) > 0.2)
    return torch.where(keep, torch.randn(rows, columns, generator=generator), 0.0)
