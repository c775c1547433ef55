"""Channel pruning as a method: a criterion scores the channels, an allocation shares the budget, surgery removes them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from compress.allocate import allocate, check_ratio, largest
from compress.allocate.curves import measure
from compress.allocate.problem import build_problem, reasons
from compress.criteria import CRITERIA
from compress.criteria.second_order import SecondOrder
from compress.errors import RunError, UserError
from compress.graph import ChannelGraph
from compress.methods import Context
from compress.methods.layer_times import Times
from compress.methods.timed_widths import LayerTimes, choose_widths, narrowest
from compress.methods.timing import meet, search
from compress.plan import Plan
from compress.surgery import apply_prune

QUANTITIES = ("params", "macs")
ATTEMPTS = 4  # each pins at least one group


class Scores(dict[str, Tensor]):
    """Group name to float64 tensor [channels]; low is removed first. `losses` and `times` keep what the allocation "measured" has measured for them."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        super().__init__(scores)
        self.losses: dict[str, Tensor] | None = None
        self.times: Times = {}


class ChannelMethod:
    """Prunes channel groups by the criterion `name`."""

    budgets = (*QUANTITIES, "latency")
    allocations = ("global", "uniform", "measured")
    rounds_widths = True
    by_channels = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.criterion = CRITERIA[name]
        self.needs_data = self.criterion.needs_data
        self.compensates = getattr(self.criterion, "compensates", False)

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that the criterion does not have."""
        self.criterion.parse(options)

    def prepare(self, context: Context) -> Scores:
        """The scores of every group."""
        return Scores(self.criterion.score(
            context.graph, context.model, context.batches, context.loss_fn, context.generator, **context.options))

    def losses(self, context: Context, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss that each further channel adds, by group, measured on `context.model` once for these scores."""
        if isinstance(state, Scores) and state.losses is not None:
            return state.losses
        graph, known = context.graph, {}

        def cut(removed: dict[str, Tensor]) -> nn.Module:
            trial = copy.deepcopy(context.model)
            self._compensate(context, trial, removed, known)
            graph.prune(trial, removed, verify=False)
            return trial

        found = measure(graph, context.model, state, context.batches, cut)
        if isinstance(state, Scores):
            state.losses = found
        return found

    def _compensate(self, context: Context, trial: nn.Module, removed: dict[str, Tensor], known: dict[str, Any] | None = None) -> None:
        """The criterion's update of the weights that stay; factors in `known` are used again by criteria that have them."""
        if self.compensates:
            kept = {"known": known} if issubclass(self.criterion, SecondOrder) else {}
            self.criterion.compensate(context.graph, trial, removed, context.batches, context.generator.clone_state(), **kept, **context.options)

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Raise `UserError` where the caps leave `budget` out of reach."""
        names = self.criterion.check(context.graph, context.model, **context.options)
        if "latency" in budget:  # how far it goes is known once it is measured
            self._most(context, names, budget["latency"])
            return
        check_ratio(context.graph, budget, names=names, max_layer_ratio=context.max_layer_ratio, round_to=context.round_to)

    def apply(self, model: nn.Module, context: Context, state: dict[str, Tensor], budget: dict[str, float]) -> Plan:
        """Remove the lowest-scored channels until `budget` is met, in place.

        A group whose removal fails the check (a width that the network's code uses as a number, say) is pinned, and the budget is shared over the
        others.
        """
        if budget == {"latency": 0}:
            budget = {"macs": 0.0}
        timed = "latency" in budget
        if timed and context.allocation != "measured":
            return self._by_latency(model, context, state, budget["latency"])
        graph = context.graph
        original = context.original[QUANTITIES.index(next(iter(budget)))] if context.original and not timed else None
        losses = self.losses(context, state) if context.allocation == "measured" else None
        for attempt in range(ATTEMPTS):
            free = {group.name for group in graph.groups if group.prunable}
            scores = {name: score for name, score in state.items() if name in free}
            if timed:
                removed, meta = self._timed(context, scores, losses, budget["latency"], state.times if isinstance(state, Scores) else {})
            else:
                removed, meta = allocate(graph, scores, budget, kind=context.allocation, max_layer_ratio=context.max_layer_ratio, round_to=context.round_to,
                                         original=original, losses=losses), {}
            trial = copy.deepcopy(model) if self.compensates else model
            self._compensate(context, trial, removed)
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
            return Plan([step], _evidence(graph) | meta)
        raise AssertionError("the last attempt returns or raises")

    def _by_latency(self, model: nn.Module, context: Context, state: dict[str, Tensor], ratio: float) -> Plan:
        """The share of MACs, removed in the same order, at which the network saves `ratio` of the original's time."""
        clock = context.clock()

        def saved(macs: float) -> float:
            trial = copy.deepcopy(model)
            self.apply(trial, context, state, {"macs": macs})
            return clock.saved(context.reference(), trial)

        current = context.graph.count()[1]
        original = context.original[1] if context.original else current
        most = 1 - (1 - self._most(context, state, ratio)) * current / original
        macs, found = search(ratio, most, saved, self.name)
        plan = self.apply(model, context, state, {"macs": macs})
        return Plan(plan.steps, plan.meta | clock.meta(ratio, found))

    def _most(self, context: Context, names: Collection[str], ratio: float) -> float:
        """The largest fraction of the network's MACs that may go; `UserError` where that is none."""
        most = largest(context.graph, "macs", context.max_layer_ratio, context.round_to, names=names) if ratio else 0.0
        if ratio and most <= 0:
            raise UserError(f"No channels of this network may be removed with max_layer_ratio {context.max_layer_ratio:g} and round_to {context.round_to}, so a budget of "
                            f"{ratio:g} of its latency cannot be met{reasons(context.graph)}.")
        return most

    def _timed(self, context: Context, scores: dict[str, Tensor], losses: dict[str, Tensor], ratio: float, known: Times) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The channels to remove so that the network saves `ratio` of the original's time, by measured losses and times of layers."""
        self._most(context, scores, ratio)
        graph, clock = context.graph, context.clock()
        problem = build_problem(graph, scores, "macs", 0.0, context.max_layer_ratio, context.round_to, 1, None, losses)
        times, full = LayerTimes(graph, context.model, problem.groups, clock, known), {group.name: group.size for group in problem.groups}

        def removed(kept: dict[str, int]) -> dict[str, Tensor]:
            return {group.name: group.order[: group.size - kept[group.name]].sort().values for group in problem.groups if kept[group.name] < group.size}

        def build(kept: dict[str, int]) -> nn.Module:
            if kept == full:
                return context.model
            trial = copy.deepcopy(context.model)
            graph.prune(trial, removed(kept), verify=False)
            return trial

        kept, saved = meet(ratio, clock, context.reference(), context.model, (times(full), times(narrowest(problem.groups))),
                           lambda limit: choose_widths(problem.groups, losses, times, limit), build, self.name)
        return removed(kept), clock.meta(ratio, saved)


def _evidence(graph: ChannelGraph) -> dict[str, Any]:
    """What the check after surgery found, for the report."""
    verdict = graph.verdict
    if verdict is None:
        return {}
    return {"verified": {"compared with": "the original, its removed channels zeroed where they are read",
                         "largest difference, relative to the largest output": verdict.error, "precision": str(verdict.dtype).removeprefix("torch.")}}
