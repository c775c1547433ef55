"""Optimal Brain Damage: S = theta^2 * F / 2, with the diagonal F = mean_i (dL_i/dtheta)^2 of the empirical Fisher for the Hessian.

Source: LeCun, Denker and Solla 1990. The rise of the loss when one weight is set to zero, to second order, the gradient taken as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.saliency import Batches, Loss, weight_criterion
from compress.saliency.per_example import example_gradients
from compress.saliency.statistics import parameters


@weight_criterion("obd", needs_data=True)
def obd(model: nn.Module, names: Sequence[str], *, batches: Batches, loss_fn: Loss, **_: object) -> dict[str, Tensor]:
    """theta^2 F / 2 per weight."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters(model, names), strict=True)}
    total = 0
    for grads, count in example_gradients(model, names, batches, loss_fn):
        total += count
        for name, rows in grads.items():
            sums[name] += rows.square().sum(0)
    return {
        name: parameter.detach().square() * sums[name] / (2 * total)
        for name, parameter in zip(names, parameters(model, names), strict=True)
    }
