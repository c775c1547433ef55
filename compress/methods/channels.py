"""Channel pruning as a method: a criterion scores the channels, an allocation shares the budget, surgery removes them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from compress.allocate import allocate, check_ratio
from compress.criteria import CRITERIA
from compress.errors import RunError
from compress.graph import ChannelGraph
from compress.methods import Context
from compress.plan import Plan
from compress.surgery import apply_prune

QUANTITIES = ("params", "macs")
ATTEMPTS = 4  # each pins at least one group


class ChannelMethod:
    """Prunes channel groups by the criterion `name`."""

    budgets = QUANTITIES
    by_channels = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.criterion = CRITERIA[name]
        self.needs_data = self.criterion.needs_data
        self.compensates = getattr(self.criterion, "compensates", False)

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
        """Remove the lowest-scored channels until `budget` is met, in place.

        A group whose removal fails the check (a width that the network's code uses as a number, say) is pinned, and the budget is shared over the
        others.
        """
        graph = context.graph
        original = context.original[QUANTITIES.index(next(iter(budget)))] if context.original else None
        for attempt in range(ATTEMPTS):
            free = {group.name for group in graph.groups if group.prunable}
            removed = allocate(graph, {name: score for name, score in state.items() if name in free}, budget, kind=context.allocation,
                               max_layer_ratio=context.max_layer_ratio, round_to=context.round_to, original=original)
            trial = copy.deepcopy(model) if self.compensates else model
            if self.compensates:
                self.criterion.compensate(graph, trial, removed, context.batches, context.generator.clone_state(), **context.options)
            try:
                step = graph.step(removed)
                graph.prune(trial, removed, verify=context.verify)
            except RunError:
                if attempt == ATTEMPTS - 1:
                    raise
                graph.prune(copy.deepcopy(model), removed, on_failure="pin")
                continue
            if trial is not model:
                apply_prune(model, step)
                model.load_state_dict(trial.state_dict())
            return Plan([step], _evidence(graph))
        raise AssertionError("the last attempt returns or raises")


def _evidence(graph: ChannelGraph) -> dict[str, Any]:
    """What the check after surgery found, for the report."""
    verdict = graph.verdict
    if verdict is None:
        return {}
    return {"verified": {"compared with": "the original, its removed channels zeroed where they are read",
                         "largest difference, relative to the largest output": verdict.error, "precision": str(verdict.dtype).removeprefix("torch.")}}
