"""First-order products g * w of weights and loss gradients, summed over the slices of each channel.

    a_c = sum over the slices of channel c of  dL/dw * w

is minus the first-order change of the loss L when those slices are scaled to zero, because d/dt L((1 - t) w) at t = 0 is -a_c.
`.grad` is never touched, and frozen weights get their gradient like any other. A gradient of zeros is a value; no gradient at all in any
batch says nothing about the layer, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.criteria.base import slices, tensors
from compress.curvature.feed import no_gradient
from compress.errors import UserError
from compress.undisturbed import arguments, differentiable, undisturbed


def batch_products(model: nn.Module, chosen: dict[str, list[Any]], batches: Iterable[tuple[Any, Any]],
                   loss_fn: Callable[[Any, Any], Tensor]) -> list[tuple[int, dict[str, Tensor]]]:
    """For each batch: (number of samples, {group name: a float64 [size]}).

    `chosen` lists the members whose slices count, by group name; a member of a buffer is not allowed. The model works in
    evaluation mode and is left as it was found, also when it raises.
    """
    results, reached = [], set()
    named = tensors(model)
    weights = {m.parameter: named[m.parameter] for members in chosen.values() for m in members}
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for inputs, targets in map(differentiable, batches):
            gradients = gradients_of(batch_loss(model, inputs, targets, loss_fn), list(weights.values()))
            reached |= {name for name, gradient in zip(weights, gradients) if gradient is not None}
            products = {name: None if gradient is None else gradient.to(torch.float64) * weights[name].detach().to(torch.float64)
                        for name, gradient in zip(weights, gradients)}
            results.append((samples(inputs), {group: _sum(members, products) for group, members in chosen.items()}))
    if results:
        check_reached(name.rpartition(".")[0] for name in weights if name not in reached)
    return results


def _sum(members: list[Any], products: dict[str, Tensor | None]) -> Tensor:
    total = torch.zeros(len(members[0].indices), dtype=torch.float64)
    for member in members:
        if products[member.parameter] is not None:
            total += slices(products[member.parameter], member.dim, member.indices).sum(1).cpu()
    return total


def batch_loss(model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor:
    """The loss of one batch; it needs no gradient where the network's outputs need none.

    Raises
    ------
    UserError: the loss is anything but one number that depends on the outputs, or does not take the outputs of this network.
    """
    outputs = model(*arguments(inputs))
    try:
        loss = loss_fn(outputs, targets)
    except (AttributeError, TypeError) as error:
        if isinstance(outputs, Tensor):
            raise
        raise UserError(f"The network returned a {type(outputs).__name__}; wrap it so that it returns its logits as one tensor.") from error
    depends = isinstance(loss, Tensor) and (
        loss.requires_grad or not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs)))
    if not depends or loss.numel() != 1:
        raise UserError("The loss function of a criterion has to return one number (the mean over the batch) that depends on the weights.")
    return loss


def gradients_of(loss: Tensor, sources: list[Tensor], **options: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the loss, None for sources that no gradient reaches."""
    if not loss.requires_grad:
        return (None,) * len(sources)
    return torch.autograd.grad(loss, sources, allow_unused=True, **options)


def check_reached(missing: Iterable[str]) -> None:
    """UserError for the first of the layers that no gradient has reached."""
    for layer in missing:
        raise no_gradient(layer)


def samples(inputs: Any) -> int:
    """Batch size of the inputs of one forward pass."""
    return len(arguments(inputs)[0])
