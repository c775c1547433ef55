"""Gradients of the mean loss with respect to chosen parameters, taken without side effects.

Symbols: theta the parameters `names`, L the mean loss over all examples of all batches, g = dL/dtheta (shaped as theta).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.saliency import Batches, Loss


@contextmanager
def scoring_mode(model: nn.Module, train_mode: bool = False) -> Iterator[None]:
    """Evaluation mode (or training mode), gradients on for all parameters; modes, buffers and `requires_grad` are restored."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if train_mode else []
    model.train(train_mode)
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def parameters(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of these names, in this order."""
    table = dict(model.named_parameters(remove_duplicate=False))
    return [table[name] for name in names]


def mean_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss_fn: Loss, *, train_mode: bool = False, temperature: float = 1.0
) -> dict[str, Tensor]:
    """g = dL/dtheta with L the mean over all examples; outputs are divided by `temperature` first. Parameters without influence get 0."""
    chosen = parameters(model, names)
    total = sum(len(y) for _, y in batches)
    sums = [torch.zeros_like(parameter) for parameter in chosen]
    with scoring_mode(model, train_mode), torch.enable_grad():
        for x, y in batches:
            loss = loss_fn(model(x) / temperature, y) * (len(y) / total)
            for held, grad in zip(sums, torch.autograd.grad(loss, chosen, allow_unused=True), strict=True):
                if grad is not None:
                    held += grad
    return dict(zip(names, sums, strict=True))
