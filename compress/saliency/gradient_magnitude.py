"""Gradient magnitude pruning: S = |dL/dtheta|, L the mean loss over the calibration batches (signs cancel before the absolute value)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compress.saliency import Batches, Loss, weight_criterion
from compress.saliency.statistics import mean_gradients


@weight_criterion("gradient_magnitude", needs_data=True)
def gradient_magnitude(
    model: nn.Module, names: Sequence[str], *, batches: Batches, loss_fn: Loss, train_mode: bool = False, **_: object
) -> dict[str, Tensor]:
    """|g|; `train_mode` uses batch statistics in BatchNorm."""
    return {name: grad.abs() for name, grad in mean_gradients(model, names, batches, loss_fn, train_mode=train_mode).items()}
