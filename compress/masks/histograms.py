"""Histograms of the weights of every masked layer, before and after pruning, as plain data.

For each layer both histograms share `BINS` bins of equal width over [low, high], the range of all its weights before and of the kept ones
after. Pruned weights are not counted after: their zeros would outweigh everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.masks.buffers import Masks

BINS = 41


def counts(values: Tensor, low: float, high: float, bins: int = BINS) -> list[int]:
    """Number of values in each of `bins` equal bins of [low, high]; all zero without values."""
    if values.numel() == 0:
        return [0] * bins
    # Rounding may put the extremes just outside of the range that they define.
    found = torch.histc(values.detach().double().cpu().clamp(low, high), bins, low, high)
    return [int(count) for count in found]


def limits(values: Tensor) -> tuple[float, float]:
    """Smallest and largest value, moved apart where they are equal; (-1, 1) without values."""
    if values.numel() == 0:
        return -1.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 1e-6, high + 1e-6)


def weight_histograms(masks: Masks, before: nn.Module) -> dict[str, dict[str, Any]]:
    """Per masked parameter `low`, `high`, and the counts `before` (all weights of the unpruned network `before`) and `after` (kept ones)."""
    old, result = dict(before.named_parameters()), {}
    for name, mask in masks.items():
        kept = masks.parameter(name).detach()[mask]
        whole = old[name].detach().to(kept.device).flatten()
        low, high = limits(torch.cat([whole, kept]))
        result[name] = {"low": low, "high": high, "before": counts(whole, low, high), "after": counts(kept, low, high)}
    return result
