"""Channel pruning as a method: a criterion scores the channels, an allocation shares the budget, surgery removes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compress.allocate import allocate, check_ratio
from compress.criteria import CRITERIA
from compress.methods import Context
from compress.plan import Plan


class ChannelMethod:
    """Prunes channel groups by the criterion `name`."""

    budgets = ("params", "macs")

    def __init__(self, name: str) -> None:
        self.name = name
        self.criterion = CRITERIA[name]
        self.needs_data = self.criterion.needs_data

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that the criterion does not have."""
        self.criterion.parse(options)

    def prepare(self, context: Context) -> dict[str, Tensor]:
        """Scores: group name to float64 tensor [channels]; low is removed first."""
        return self.criterion.score(
            context.graph, context.model, context.batches, context.loss_fn, context.generator, **context.options)

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Raise `UserError` where the caps leave `budget` out of reach."""
        names = self.criterion.check(context.graph, context.model, **context.options)
        check_ratio(context.graph, budget, names=names, max_layer_ratio=context.max_layer_ratio, round_to=context.round_to)

    def apply(self, model: nn.Module, context: Context, state: dict[str, Tensor], budget: dict[str, float]) -> Plan:
        """Remove the lowest-scored channels until `budget` is met, in place."""
        removed = allocate(
            context.graph, state, budget, kind=context.allocation, max_layer_ratio=context.max_layer_ratio, round_to=context.round_to,
            original=context.original[("params", "macs").index(next(iter(budget)))] if context.original else None)
        if getattr(self.criterion, "compensates", False):
            self.criterion.compensate(context.graph, model, removed, context.batches, context.generator.clone_state(), **context.options)
        return Plan(steps=[context.graph.prune(model, removed, verify=context.verify)])
