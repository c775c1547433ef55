"""Gradients of single examples, in chunks: rows [n, *theta] of dL_i/dtheta for the parameters `names`, without side effects.

L_i is the loss of example i with its own label (the empirical Fisher's), in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from compress.saliency import Batches, Loss
from compress.saliency.statistics import parameters, scoring_mode


def example_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss_fn: Loss, chunk: int = 16
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Pairs (gradients by name, each `[n, *shape]`, n) over all examples, at most `chunk` at a time."""
    chosen = {name: parameter.detach() for name, parameter in zip(names, parameters(model, names), strict=True)}
    rest = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()] if name not in chosen}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, {**rest, **values}, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    with scoring_mode(model):
        for x, y in batches:
            for first in range(0, len(y), chunk):
                part = y[first : first + chunk]
                yield each(chosen, x[first : first + chunk], part), len(part)
