"""Plan step "mask": `{"kind": "mask", "parameters": [names], "scope": preset}`: the named parameters get mask buffers.

The buffers start all True; the masks themselves are tensors of the network's state and come with its weights.
"""

from __future__ import annotations

from torch import nn

from compress.errors import UserError
from compress.masks import add_buffers
from compress.plan import STEPS
from compress.surgery import Step


@STEPS.register("mask")
def apply_mask(model: nn.Module, step: Step) -> None:
    """Attach the buffers in place; UserError where a parameter is missing."""
    names = step.get("parameters")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError('A "mask" step of the plan must hold "parameters" [names].')
    known = dict(model.named_parameters())
    for name in names:
        if name not in known:
            raise UserError(f"The plan masks parameter {name!r}, which this network does not have.")
    add_buffers(model, names)
