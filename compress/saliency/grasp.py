"""GraSP: gradient signal preservation (Wang et al. 2020, arXiv:2002.07376).

S = theta * (H g), with g = dL/dtheta, H the Hessian and L the mean loss of the outputs divided by a temperature T. H g is the
gradient of stop(g)^T g(theta), accumulated over the batches. The paper writes -theta * H g and keeps the lowest; this is the same
ranking with the sign of "keep the highest". The published division by |sum S| changes no ranking and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.saliency import Batches, Loss, weight_criterion
from compress.saliency.statistics import mean_gradients, parameters, scoring_mode


@weight_criterion("grasp", needs_data=True)
def grasp(
    model: nn.Module,
    names: Sequence[str],
    *,
    batches: Batches,
    loss_fn: Loss,
    temperature: float = 200.0,
    train_mode: bool = False,
    **_: object,
) -> dict[str, Tensor]:
    """theta * H g; may be negative. `temperature` divides the outputs, `train_mode` uses batch statistics in BatchNorm."""
    if not temperature > 0:
        raise UserError(f"The temperature of weight criterion 'grasp' must be above 0, got {temperature!r}.")
    held = mean_gradients(model, names, batches, loss_fn, train_mode=train_mode, temperature=temperature)
    chosen = parameters(model, names)
    total = sum(len(y) for _, y in batches)
    product = [torch.zeros_like(parameter) for parameter in chosen]
    with scoring_mode(model, train_mode), torch.enable_grad():
        for x, y in batches:
            loss = loss_fn(model(x) / temperature, y) * (len(y) / total)
            grads = torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True)
            inner = sum((held[name] * grad).sum() for name, grad in zip(names, grads, strict=True) if grad is not None)
            for sum_, part in zip(product, torch.autograd.grad(inner, chosen, allow_unused=True), strict=True):
                if part is not None:
                    sum_ += part
    return {name: weight.detach() * hg for name, weight, hg in zip(names, chosen, product, strict=True)}
