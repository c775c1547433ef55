"""SNIP: connection sensitivity S = |dL/dm| at m = 1 (Lee et al. 2018, arXiv:1810.02340).

With W = m * theta the derivative is dL/dm = theta * dL/dW; it is averaged over all batches before the absolute value. The published
division by the total changes no ranking and is left out of the score. For a homogeneous network the sum over a layer before the
absolute value is <dL/dz, z>, z the network's output, and is the same for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compress.saliency import Batches, Loss, weight_criterion
from compress.saliency.statistics import mean_gradients, parameters


@weight_criterion("snip", needs_data=True)
def snip(
    model: nn.Module,
    names: Sequence[str],
    *,
    batches: Batches,
    loss_fn: Loss,
    train_mode: bool = False,
    signed: bool = False,
    **_: object,
) -> dict[str, Tensor]:
    """|theta * g|; `signed` leaves the absolute value out, `train_mode` uses batch statistics in BatchNorm."""
    grads = mean_gradients(model, names, batches, loss_fn, train_mode=train_mode)
    scores = {name: weight.detach() * grads[name] for name, weight in zip(names, parameters(model, names), strict=True)}
    return scores if signed else {name: score.abs() for name, score in scores.items()}
