"""EigenDamage and its relatives as methods: one threshold over the rows and columns of all layers in their Kronecker-factored eigenbasis.

With the allocation "uniform" every row and column counts by its place in its own layer, so that all layers lose the same fraction.
Under a budget the threshold is bisected on the counts of the blocks that it leads to (`compress.decompose.budget`). With `pool_fraction` set a
round removes that share of the pool, as published, until the budget is met; rounds that end before say so in the plan's meta
(`"missing": {"params": n}`) and in the log, and the network is what they reached.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.decompose.improved import CycleState, ImprovedOptions, check_growth, cut, grow
from compress.decompose.reach import most, round_choice, saved
from compress.decompose.rounds import EigenDamageOptions, apply_round, rejected, scores
from compress.decompose.targets import left_alone, observe
from compress.errors import UserError
from compress.methods import METHODS, Context, parse_options
from compress.methods.low_rank import layer_inputs
from compress.plan import Plan
from compress.steps.factorize import blocks, factorize_step

QUANTITIES = ("params", "macs")


class EigenDamageMethod:
    """EigenDamage (Wang et al. 2019); with `depthwise` the kept core is split into a depthwise convolution."""

    budgets = QUANTITIES
    allocations = ("global", "uniform")
    rounds_widths = False
    by_channels = False
    needs_data = True
    Options: type[EigenDamageOptions] = EigenDamageOptions

    def __init__(self, name: str, **fixed: Any) -> None:
        self.name, self.fixed = name, fixed

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that the method does not have."""
        self.options(options)

    def options(self, options: dict[str, Any]) -> Any:
        """The options with what the method's name fixes."""
        return parse_options(self.name, self.Options, self.fixed | options)

    def chosen(self, context: Context) -> Any:
        """The options of a context, its allocation included."""
        options = self.options(context.options)
        return options.model_copy(update={"uniform": True}) if context.allocation == "uniform" else options

    def rounds(self, options: dict[str, Any]) -> int | None:
        """The rounds that the method's own options ask for; None where they leave it to `prune.rounds`."""
        return self.options(options).rounds

    def stepwise(self, options: dict[str, Any]) -> bool:
        """Whether every round goes for the whole ratio, by its pool fraction, and the rounds end once it is met."""
        return self.options(options).stepwise

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Raise `UserError` for a budget that one round cannot reach under the cap, whatever the statistics are."""
        (quantity, ratio), = budget.items()
        self.check_rounds(context, quantity, [ratio])

    def check_rounds(self, context: Context, quantity: str, ratios: list[float]) -> None:
        """Raise `UserError` where the rounds cannot reach `ratios`, one after the other, under the cap, whatever the statistics are."""
        options, index = self.chosen(context), QUANTITIES.index(quantity)
        if options.stepwise:
            return
        total, calls = context.graph.count()[index], layer_inputs(context)
        for number, ratio in enumerate(ratios, 1):
            reach = most(context.model, calls, options, number, context.exclude)[index]
            if reach < needed(context, {quantity: ratio})[index]:
                raise UserError(f"A budget that removes {ratio:g} of the {quantity} in {number} round(s) cannot be reached: at most {reach / total:.4f} "
                                f"can be removed by {self.name} under its cap of {options.cap:g}; use more rounds, a larger cap or a smaller ratio.")

    def prepare(self, context: Context) -> Any:
        """Statistics and importances of every layer."""
        return scores(context.model, context.batches, self.chosen(context), context.generator, context.exclude, context.example)

    def apply(self, model: nn.Module, context: Context, state: Any, budget: dict[str, float]) -> Plan:
        """One round on `model`, in place."""
        options, before = self.chosen(context), blocks(model)
        skipped = left_alone(model, options.skip_last, context.exclude, observe(model, context.example))
        choice = round_choice(state, options, needed(context, budget))
        skipped |= rejected(state, choice.kept, apply_round(model, state, choice.kept, options, split=choice.split))
        return Plan([factorize_step(before, model)], {"skipped": skipped} | lacking(context, budget, saved(state, choice, options)))


class ImprovedMethod(EigenDamageMethod):
    """Improved EigenDamage: one cut per round, then capacity is given back before the next one."""

    Options = ImprovedOptions

    def check_rounds(self, context: Context, quantity: str, ratios: list[float]) -> None:
        """As for EigenDamage; a decomposition that cannot grow is refused where there is growth between rounds."""
        if len(ratios) > 1:
            check_growth(self.chosen(context))
        super().check_rounds(context, quantity, ratios)

    def growth(self, options: dict[str, Any]) -> tuple[float, list[float] | None] | None:
        """(factor of the learning rate, milestones; None for those of a cut) of the fine-tuning after growth; None without growth."""
        chosen = self.options(options)
        return (chosen.growth_lr_factor, chosen.growth_milestones) if chosen.back_ratio else None

    def prepare(self, context: Context) -> None:
        """Nothing beforehand: a cycle takes its own statistics."""

    def apply(self, model: nn.Module, context: Context, state: None, budget: dict[str, float]) -> Plan:
        """The cut of one cycle, in place; what growth will draw from is kept in the plan."""
        options, cycle, before = self.chosen(context), _cycle(context), blocks(model)
        skipped = left_alone(model, options.skip_last, context.exclude, observe(model, context.example))
        # A copy of the generator, so that one ratio does not depend on the ratios before it.
        cut(model, context.batches, options, cycle, context.generator.clone_state(), context.exclude, needed(context, budget), context.example)
        meta = {"grow": {"shares": cycle.shares, "removed": cycle.removed, "stalled": cycle.stalled}, "skipped": skipped | cycle.rejected}
        return Plan([factorize_step(before, model)], meta | lacking(context, budget, cycle.saved))

    def regrow(self, model: nn.Module, context: Context) -> Plan:
        """The growth of one cycle, in place, from what its cut left in `context.meta`."""
        before = blocks(model)
        grow(model, self.chosen(context), _cycle(context), context.generator)
        return Plan([factorize_step(before, model)], {"grow": context.meta["grow"]})


def _cycle(context: Context) -> CycleState:
    """What the cycles before have left in the plan."""
    grow = context.meta.get("grow", {})
    pairs = ({name: tuple(pair) for name, pair in grow.get(key, {}).items()} for key in ("shares", "removed"))
    return CycleState(*pairs, stalled=grow.get("stalled", False))


def needed(context: Context, budget: dict[str, float]) -> tuple[int, int]:
    """(parameters, MACs) that have to go so that `budget` is met."""
    (quantity, ratio), = budget.items()
    index = QUANTITIES.index(quantity)
    current = context.graph.count()[index]
    original = context.original[index] if context.original else current
    missing = max(0, round(current - (1 - ratio) * original))
    return (missing, 0) if index == 0 else (0, missing)


def lacking(context: Context, budget: dict[str, float], saved: tuple[int, int]) -> dict[str, Any]:
    """For the plan's meta: how much of `budget` a round that saved `saved` has left over; empty where it is met."""
    (quantity, _), = budget.items()
    index = QUANTITIES.index(quantity)
    missing = needed(context, budget)[index] - saved[index]
    return {"missing": {quantity: missing}} if missing > 0 else {}


METHODS.register("eigendamage")(EigenDamageMethod("eigendamage"))
METHODS.register("eigendamage_depthwise")(EigenDamageMethod("eigendamage_depthwise", depthwise=True))
METHODS.register("improved_eigendamage")(ImprovedMethod("improved_eigendamage"))
