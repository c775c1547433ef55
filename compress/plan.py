"""A plan: what is done to which layer of a network, as pure data.

`{"format": 1, "steps": [...], "meta": {...}}`. Each step has a `kind` with a function registered under it; replayed on a freshly built
network the steps give the same architecture, into which the compressed weights are then loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.errors import UserError
from compress.registry import Registry
from compress.surgery import Step, apply_prune

FORMAT = 1
STEPS: Registry[Callable[[nn.Module, Step], object]] = Registry("plan step", "compress.steps")
STEPS.register("prune")(apply_prune)


@dataclass
class Plan:
    """Steps in the order in which they are done; `meta` is free (method, budget, versions)."""

    steps: list[Step] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as a JSON object."""
        return json.dumps({"format": FORMAT, "steps": self.steps, "meta": self.meta}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads a plan; UserError in one sentence where the text is not one."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(f"The plan is not JSON ({error}); it may be truncated.") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"The plan has no \"format\": {FORMAT}; it was written by another program or version.")
        steps = data.get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, dict) and str(step.get("kind")) in STEPS for step in steps):
            raise UserError(f"The plan's steps must be a list of objects with a \"kind\" out of: {', '.join(STEPS.names())}.")
        for position, step in enumerate(steps):
            if step["kind"] == "prune":
                _check_prune(position, step)
        meta = data.get("meta", {})
        if not isinstance(meta, dict):
            raise UserError("The plan's \"meta\" must be an object.")
        return cls(steps, meta)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prune(position: int, step: Step) -> None:
    """UserError where a prune step has not the documented form."""
    slices, attributes = step.get("slices"), step.get("attributes")
    good = isinstance(slices, dict) and isinstance(attributes, dict) and all(isinstance(values, dict) for values in attributes.values())
    good = good and all(
        isinstance(dims, dict)
        and all(dim.isdecimal() and isinstance(indices, list) and all(map(_is_whole, indices)) for dim, indices in dims.items())
        for dims in slices.values()
    )
    if not good:
        raise UserError(f'Step {position} of the plan must hold "slices" {{parameter: {{dimension: [indices]}}}} '
                        'and "attributes" {module: {name: value}}.')


def apply_plan(model: nn.Module, plan: Plan | Iterable[Step]) -> nn.Module:
    """Replays a plan on a freshly built network, in place, and returns it.

    Raises UserError where a step does not fit the network; steps before it have then been done.
    """
    for step in plan.steps if isinstance(plan, Plan) else plan:
        STEPS[step["kind"]](model, step)
    return model
