"""Plan step "factorize": `{"kind": "factorize", "layers": {name: {"shapes": {factor: shape}, "depthwise": bool}}}`.

Each named layer is replaced by a block of smaller layers with factors of these shapes (see `compress.decompose.modules.describe`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.decompose.modules import FactorizedConv2d, FactorizedLinear, describe, rebuild, replace_module
from compress.errors import UserError
from compress.plan import STEPS
from compress.surgery import Step

BLOCKS = (FactorizedConv2d, FactorizedLinear)


@STEPS.register("factorize")
def apply_factorize(model: nn.Module, step: Step) -> None:
    """Replace the layers of the step in place; UserError where one is missing or does not fit."""
    layers = step.get("layers")
    if not isinstance(layers, dict):
        raise UserError('A "factorize" step of the plan must hold "layers" {name: description}.')
    for name, description in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"The plan factorizes layer {name!r}, which this network does not have.") from None
        try:
            block = rebuild(module, description)
        except (KeyError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
            raise UserError(f"The plan's description of layer {name!r} does not fit a {type(module).__name__} ({error}).") from None
        replace_module(model, name, block)


def blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The description of every factorized layer of `model`."""
    return {name: describe(module) for name, module in model.named_modules() if isinstance(module, BLOCKS)}


def factorize_step(before: dict[str, dict[str, Any]], model: nn.Module) -> Step:
    """The step that leads from a network with the blocks `before` to `model`."""
    return {"kind": "factorize", "layers": {name: found for name, found in blocks(model).items() if before.get(name) != found}}
