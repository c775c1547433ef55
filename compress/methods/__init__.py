"""Compression methods by name: what the configuration's `prune.methods` and `compress(method=...)` accept.

A method measures its statistics once (`prepare`) and then compresses a copy of the network to any budget (`apply`). Channel criteria
become methods by themselves: a file in `compress/criteria` is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress.allocate import ALLOCATIONS
from compress.config import Section
from compress.criteria import CRITERIA
from compress.errors import RunError, UserError, cause
from compress.graph import ChannelGraph
from compress.methods.timing import Timing
from compress.plan import Plan
from compress.registry import Registry, nearest
from compress.undisturbed import arguments, undisturbed


@dataclass(frozen=True)
class Context:
    """What every method is given.

    Attributes
    ----------
    model:
        The trained network; methods do not change it.
    graph:
        Its channel graph.
    example:
        Example inputs, on the model's device.
    original:
        Parameters and MACs of the uncompressed network, where `model` has been compressed before; a ratio is always of these.
    batches:
        Calibration data: `(x [n, ...], y [n])` pairs from the training set, on the model's device.
    meta:
        What the plan of the round before says of it; empty in the first round.
    uncompressed:
        The uncompressed network, where `model` has been compressed before; a ratio of latency is of its time.
    timing:
        How a budget of latency is measured; on the example inputs where None.
    """

    model: nn.Module
    graph: ChannelGraph
    example: Any
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    generator: torch.Generator
    original: tuple[int, int] | None = None
    exclude: tuple[str, ...] = ()
    allocation: str = "global"
    max_layer_ratio: float = 0.95
    round_to: int = 1
    verify: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    uncompressed: nn.Module | None = None
    timing: Timing | None = None

    def clock(self) -> Timing:
        """How latency is measured."""
        return self.timing or Timing(self.example)

    def reference(self) -> nn.Module:
        """The network that a ratio of latency is taken of."""
        return self.model if self.uncompressed is None else self.uncompressed


class Method(Protocol):
    """One compression method."""

    budgets: tuple[str, ...]
    allocations: tuple[str, ...]
    needs_data: bool
    rounds_widths: bool  # whether kept widths or ranks can be multiples of `round_to`
    by_channels: bool  # whether the channel graph decides what may go, so that its coverage belongs in the report

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that the method does not have."""

    def prepare(self, context: Context) -> Any:
        """Statistics or scores of the unpruned network."""

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Raise `UserError` for a budget that no plan of this method reaches; `context` needs no data."""

    def apply(self, model: nn.Module, context: Context, state: Any, budget: dict[str, float]) -> Plan:
        """Compress `model` in place to `budget` ({"macs": 0.5}) and return what was done."""


METHODS: Registry[Method] = Registry("method", "compress.methods")


def parse_options(method: str, options: type[Section], given: dict[str, Any]) -> Any:
    """`given` as an `options` object; every fault is one sentence of a `UserError`."""
    try:
        return options(**given)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key, known = ".".join(map(str, fault["loc"])), sorted(options.model_fields)
            faults.append(f"Method {method!r} has no option {key!r}{nearest(key, known)}; known: {', '.join(known) or 'none'}." if fault["type"] == "extra_forbidden"
                          else f"Option {key!r} of method {method!r} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}.")
        raise UserError(*faults) from None


def carry_out(name: str, model: nn.Module, context: Context, state: Any, budget: dict[str, float]) -> Plan:
    """Compress `model` in place by the method `name`, and see that the result runs as it will be used.

    Raises `RunError` where it does not: a module of the user may read the weight of a layer inside it, which a factorized layer has not.
    """
    plan = method(name).apply(model, context, state, budget)
    try:
        with torch.no_grad(), undisturbed(model):
            model(*arguments(context.example))
    except Exception as error:
        raise RunError(f"Method {name!r} left a network that cannot be run ({cause(error)}); exclude the layers whose parts the module around them reads.") from error
    return plan


def check_allocation(name: str, allocation: str) -> None:
    """Raise `UserError` for an unknown allocation, or one by which the method does not share its budget."""
    known = method(name).allocations
    if ALLOCATIONS[allocation] and allocation not in known:
        raise UserError(f"Method {name!r} shares its budget by one of {', '.join(known)}, and the allocation is {allocation!r}.")


def check_rounding(name: str, round_to: int) -> None:
    """Raise `UserError` for multiples that the method does not keep to."""
    if round_to != 1 and not method(name).rounds_widths:
        raise UserError(f"Method {name!r} has no widths or ranks that could be multiples of round_to, and round_to is {round_to}; leave it at 1 or choose another method.")


def needs_data(name: str, allocation: str) -> bool:
    """Whether the method needs calibration data, for its statistics or to share its budget."""
    return method(name).needs_data or allocation == "measured"


def names() -> list[str]:
    """Every method that `method` knows."""
    return sorted({*METHODS.names(), *CRITERIA.names()})


def method(name: str) -> Method:
    """The method called `name`; an unknown name is a `UserError` with the nearest one."""
    from compress.methods.channels import ChannelMethod

    if name in METHODS:
        return METHODS[name]
    if name in CRITERIA:
        return ChannelMethod(name)
    raise UserError(f"Unknown method {name!r}{nearest(name, names())}; known: {', '.join(names())}.")
