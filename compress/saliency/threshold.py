"""Threshold pruning: keep a weight iff |theta| is strictly above a threshold.

With the option `threshold` the density is an outcome; without it the threshold is the quantile that a wanted density needs, which is
magnitude pruning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.saliency import weight_criterion
from compress.saliency.statistics import parameters


@weight_criterion("threshold")
def threshold(model: nn.Module, names: Sequence[str], *, threshold: float | None = None, **_: object) -> dict[str, Tensor]:
    """Absolute values; those above `threshold` become +inf, which protects them."""
    if threshold is not None and not threshold >= 0:
        raise UserError(f"The threshold of weight criterion 'threshold' must be a number of at least 0, got {threshold!r}.")
    scores = {}
    for name, parameter in zip(names, parameters(model, names), strict=True):
        size = parameter.detach().abs()
        scores[name] = size if threshold is None else size.masked_fill(size > threshold, torch.inf)
    return scores
