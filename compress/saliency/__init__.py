"""Weight criteria: one number per weight, the lowest is removed first.

A criterion is one file of this package with a function decorated by `weight_criterion`; in configurations its name carries the
prefix `mask_`. It reads the network as it stands (pruned weights are zero) and changes nothing: no `.grad`, no buffer, no mode.

Two values are special: `+inf` protects a weight (it is never removed by this criterion), and weights that are already pruned are
ranked below everything by the caller (`compress.masks`), so that no criterion can bring them back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.registry import Registry, nearest

Batches = Sequence[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WeightCriterion:
    """A registered criterion.

    `score(model, names, *, batches, loss_fn, generator, **options)` returns one tensor per name, shaped as the parameter.
    `needs_data`: the score reads calibration batches. `iterations`: default number of score-and-prune rounds.
    """

    name: str
    score: Callable[..., dict[str, Tensor]]
    needs_data: bool
    iterations: int

    def options(self) -> list[str]:
        """Names of the criterion's own options."""
        shared = {"model", "names", "batches", "loss_fn", "generator", "_"}
        return [name for name in inspect.signature(self.score).parameters if name not in shared]


SALIENCY: Registry[WeightCriterion] = Registry("weight criterion", "compress.saliency")


def weight_criterion(name: str, *, needs_data: bool = False, iterations: int = 1) -> Callable[[Callable], Callable]:
    """Register the decorated scoring function as weight criterion `name`."""

    def store(function: Callable) -> Callable:
        SALIENCY.register(name)(WeightCriterion(name, function, needs_data, iterations))
        return function

    return store


def score_weights(
    model: nn.Module,
    names: Sequence[str],
    criterion: str,
    *,
    batches: Batches | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    generator: torch.Generator | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Score the parameters `names` of `model` by the criterion of this name.

    `batches`: pairs `(x, y)`; `loss_fn(outputs, y)` is the mean loss of a batch. Returns a dictionary name -> tensor of the parameter's
    shape, on its device.

    Raises `UserError` for an unknown criterion or option, for missing data, and for scores that are not numbers.
    """
    found = SALIENCY[criterion]
    for option in options:
        if option not in found.options():
            known = ", ".join(found.options()) or "none"
            raise UserError(
                f"Weight criterion {criterion!r} has no option {option!r}{nearest(option, found.options())}; its options: {known}."
            )
    if found.needs_data and not batches:
        raise UserError(f"Weight criterion {criterion!r} needs calibration data and got none; give at least one batch.")
    scores = found.score(model, names, batches=batches, loss_fn=loss_fn, generator=generator, **options)
    for name in names:
        if bool(torch.isnan(scores[name]).any()):
            raise UserError(
                f"Weight criterion {criterion!r} gave scores that are not numbers for {name!r}; "
                "check the network's weights and the data for NaN."
            )
    return scores
