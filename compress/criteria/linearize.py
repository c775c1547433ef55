"""First-order products g * w of weights and loss gradients, summed over the slices of each channel.

    a_c = sum over the slices of channel c of  dL/dw * w

is minus the first-order change of the loss L when those slices are scaled to zero, because d/dt L((1 - t) w) at t = 0 is -a_c.
`.grad` is never touched, and frozen weights get their gradient like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress.criteria.base import slices, tensors
from compress.errors import UserError
from compress.undisturbed import arguments, differentiable, undisturbed


def batch_products(model: nn.Module, chosen: dict[str, list[Any]], batches: Iterable[tuple[Any, Any]],
                   loss_fn: Callable[[Any, Any], Tensor]) -> list[tuple[int, dict[str, Tensor]]]:
    """For each batch: (number of samples, {group name: a float64 [size]}).

    `chosen` lists the members whose slices count, by group name; a member of a buffer is not allowed. The model works in
    evaluation mode and is left as it was found, also when it raises.
    """
    results = []
    named = tensors(model)
    weights = {m.parameter: named[m.parameter] for members in chosen.values() for m in members}
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for inputs, targets in map(differentiable, batches):
            loss = loss_fn(model(*arguments(inputs)), targets)
            check_scalar(loss)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            products = {name: None if gradient is None else gradient.to(torch.float64) * weights[name].detach().to(torch.float64)
                        for name, gradient in zip(weights, gradients)}
            results.append((samples(inputs), {group: _sum(members, products) for group, members in chosen.items()}))
    return results


def _sum(members: list[Any], products: dict[str, Tensor | None]) -> Tensor:
    total = torch.zeros(len(members[0].indices), dtype=torch.float64)
    for member in members:
        if products[member.parameter] is not None:
            total += slices(products[member.parameter], member.dim, member.indices).sum(1).cpu()
    return total


def check_scalar(loss: Any) -> None:
    """UserError where a loss function returned anything but one number that depends on the weights."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UserError("The loss function of a criterion has to return one number (the mean over the batch) that depends on the weights.")


def samples(inputs: Any) -> int:
    """Batch size of the inputs of one forward pass."""
    return len(arguments(inputs)[0])
