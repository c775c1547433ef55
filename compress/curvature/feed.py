"""What every pass over calibration data shares: which layers, what a batch holds, what the network returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from compress.curvature.geometry import KINDS
from compress.errors import UserError
from compress.registry import nearest
from compress.undisturbed import differentiable

Batches = Iterable[Any]


def find_layers(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Linear and Conv2d layers by name: all of them (inside factorized blocks too), or the named ones, which may be blocks.

    Raises
    ------
    UserError: a name that does not exist or is no Linear, Conv2d or block; a network without layers.
    """
    modules = dict(model.named_modules())
    if layers is None:
        found = {name: module for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))}
        if not found:
            raise UserError("The network has no Linear or Conv2d layer to collect statistics of.")
        return found
    found = {}
    for name in layers:
        if name not in modules:
            raise UserError(f"The network has no layer {name!r}{nearest(name, list(modules))}.")
        if not isinstance(modules[name], KINDS):
            raise UserError(f"Layer {name!r} is a {type(modules[name]).__name__}; statistics are collected of Linear and Conv2d layers.")
        found[name] = modules[name]
    return found


def unpack(batch: Any) -> tuple[tuple, Tensor | None, int]:
    """(positional arguments, labels, images) of a batch: a tensor, (inputs,), or (inputs, labels) with a tensor or tuple of inputs."""
    batch = differentiable(batch)
    inputs, labels = (batch, None) if isinstance(batch, Tensor) else (*batch, None, None)[:2] if isinstance(batch, (tuple, list)) else (None, None)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs) if isinstance(inputs, (tuple, list)) else ()
    if not arguments or not isinstance(arguments[0], Tensor):
        raise UserError(f"A calibration batch is {_kind(batch)}; expected a tensor of inputs, or (inputs, labels) with a tensor or a tuple of inputs.")
    # gradients that inputs ask for are not wanted here
    arguments = tuple(part.detach() if isinstance(part, Tensor) else part for part in arguments)
    return arguments, labels, arguments[0].shape[0]


def _kind(batch: Any) -> str:
    """The types in a batch that cannot be used: "a dict", "(dict, Tensor)"."""
    return f"({', '.join(type(part).__name__ for part in batch)})" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"


def forward(model: nn.Module, arguments: tuple) -> Tensor:
    """The network's output tensor; UserError where it is none."""
    output = model(*arguments)
    if not isinstance(output, Tensor):
        raise UserError(f"The network returned a {type(output).__name__}; wrap it so that it returns its logits as one tensor.")
    return output


def no_gradient(name: str) -> UserError:
    """The error for a layer that was to be measured and got no gradient."""
    return UserError(
        f"No gradient reached layer {name!r} (it runs without gradients, outside its module, or its output is unused); exclude it."
    )


def with_last(items: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Every item with whether it is the last one."""
    item = next(items)
    for following in itertools.chain(items, (None,)):
        yield item, following is None
        item = following
