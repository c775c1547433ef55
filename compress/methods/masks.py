"""Masks as methods: `mask_<criterion>` for every weight criterion, under the budget {"weights": fraction of masked weights removed}.

The network keeps its shape; boolean buffers `<parameter>_mask` say which weights are kept; `fit` enforces them, and
any other training loop can by `compress.masks.enforced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.config import Section
from compress.errors import UserError
from compress.masks import Masks, parse_pattern, prune, select_parameters
from compress.methods import METHODS, Context, parse_options
from compress.plan import Plan
from compress.registry import nearest
from compress.saliency import SALIENCY
from compress.schedule import SCHEDULES
from compress.undisturbed import arguments


class MaskOptions(Section):
    """Options of all mask methods; a criterion's own options (temperature, block, ...) are given beside them."""

    scope: Literal["conv", "conv+linear", "all-weights"] = Field("conv+linear", description="what masks may touch")
    biases: bool = Field(False, description="mask the biases of the layers in scope too")
    residual: bool = Field(False, description="mask the scales on skip paths too (networks built with the option skip_scale)")
    pool: Literal["global", "local"] | None = Field(None, description="one ranking, or one per tensor; null: as the allocation says")
    pattern: str = Field("unstructured", description="unstructured, N:M, block-RxC or vector-V")
    iterations: int | None = Field(None, ge=1, description="score-and-prune rounds; null: the criterion's default")
    schedule: str = Field("geometric", description=f"density by round: {', '.join(SCHEDULES)}")
    allow_empty: bool = Field(False, description="let a layer lose all its weights")
    invert: bool = Field(False, description="remove the highest scores first")


class MaskMethod:
    """Masks by one weight criterion."""

    budgets = ("weights",)
    allocations = ("global", "uniform")
    rounds_widths = False
    by_channels = False

    def __init__(self, criterion: str) -> None:
        self.name = f"mask_{criterion}"
        self.criterion = criterion
        self.needs_data = SALIENCY[criterion].needs_data

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that neither masks nor the criterion have."""
        self._options(options)

    def _options(self, options: dict[str, Any]) -> tuple[MaskOptions, dict[str, Any]]:
        known = list(MaskOptions.model_fields)
        own = {key: value for key, value in options.items() if key not in known}
        for key in own:
            allowed = [*known, *SALIENCY[self.criterion].options()]
            if key not in allowed:
                raise UserError(f"Method {self.name!r} has no option {key!r}{nearest(key, allowed)}; known: {', '.join(allowed)}.")
        shared = parse_options(self.name, MaskOptions, {key: value for key, value in options.items() if key in known})
        parse_pattern(shared.pattern)
        return shared, own

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Scopes that match nothing and patterns that do not fit are found here; whether a layer would be emptied depends on the scores and is
        found in `apply`."""
        shared, _ = self._options(context.options)
        _check_scope(context.model, shared, context.exclude)

    def prepare(self, context: Context) -> None:
        """Nothing beforehand: scores are taken in each round."""

    def apply(self, model: nn.Module, context: Context, state: None, budget: dict[str, float]) -> Plan:
        """Attach masks to `model` and prune it, in place."""
        shared, own = self._options(context.options)
        _check_scope(model, shared, context.exclude)
        masks = Masks.attach(model, shared.scope, context.exclude, shared.biases, shared.residual)
        first = arguments(context.example)[0]
        if self.criterion == "synflow" and isinstance(first, Tensor):
            own = {"input_shape": tuple(first.shape[1:])} | own
        pool = shared.pool or ("global" if context.allocation == "global" else "local")
        # A copy, so that one ratio's draws do not depend on the ratios before it.
        generator = context.generator.clone_state()
        history = prune(
            masks,
            self.criterion,
            1 - budget["weights"],
            iterations=shared.iterations,
            schedule=shared.schedule,
            pool=pool,
            pattern=parse_pattern(shared.pattern),
            allow_empty=shared.allow_empty,
            invert=shared.invert,
            batches=context.batches,
            loss_fn=context.loss_fn,
            generator=generator,
            options=own,
        )
        step = {"kind": "mask", "parameters": masks.names, "scope": shared.scope}
        facts = {
            "density": masks.density,
            "densities": history,
            "pattern": shared.pattern,
            "pool": pool,
            "layer_density": masks.layer_density(),
        }
        return Plan([step], {"mask": facts})


def _check_scope(model: nn.Module, shared: MaskOptions, exclude: Sequence[str]) -> None:
    """Raise `UserError` where the scope matches nothing, or holds vectors that a pattern of rows and columns does not fit."""
    names = select_parameters(model, shared.scope, exclude, shared.biases, shared.residual)
    vectors = [name for name in names if model.get_parameter(name).dim() < 2]
    if vectors and shared.pattern != "unstructured":
        raise UserError(
            f"Mask pattern {shared.pattern!r} needs rows and columns, which {vectors[0]!r} has not; choose the scope conv or conv+linear without "
            "biases and residual."
        )


for _criterion in SALIENCY.names():
    METHODS.register(f"mask_{_criterion}")(MaskMethod(_criterion))
