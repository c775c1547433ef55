"""EigenDamage and its relatives as methods: one threshold over the rows and columns of all layers in their Kronecker-factored eigenbasis.

Under a budget the threshold is bisected on the counts of the blocks that it leads to (`compress.decompose.budget`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.decompose.budget import choice_for
from compress.decompose.improved import CycleState, ImprovedOptions, cut, grow
from compress.decompose.rounds import EigenDamageOptions, apply_round, scores
from compress.decompose.targets import left_alone
from compress.methods import METHODS, Context, parse_options
from compress.plan import Plan
from compress.steps.factorize import blocks, factorize_step

QUANTITIES = ("params", "macs")


class EigenDamageMethod:
    """EigenDamage (Wang et al. 2019); with `depthwise` the kept core is split into a depthwise convolution."""

    budgets = QUANTITIES
    allocations = ("global", "uniform")
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

    def rounds(self, options: dict[str, Any]) -> int | None:
        """The rounds that the method's own options ask for; None where they leave it to `prune.rounds`."""
        chosen = self.options(options)
        return chosen.rounds if "rounds" in chosen.model_fields_set else None

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """What can be reached depends on the statistics; an unreachable budget is found in `apply`."""

    def prepare(self, context: Context) -> Any:
        """Statistics and importances of every layer."""
        return scores(context.model, context.batches, self.options(context.options), context.generator, context.exclude)

    def apply(self, model: nn.Module, context: Context, state: Any, budget: dict[str, float]) -> Plan:
        """One round on `model`, in place."""
        options, before = self.options(context.options), blocks(model)
        skipped = left_alone(model, options.skip_last, context.exclude)
        kept, split = choice_for(state, options, needed(context, budget))
        apply_round(model, state, kept, options, split=split)
        return Plan([factorize_step(before, model)], {"skipped": skipped})


class ImprovedMethod(EigenDamageMethod):
    """Improved EigenDamage: one cut per round, then capacity is given back before the next one."""

    Options = ImprovedOptions
    growth_lr_factor = 10.0  # published: lr 1e-2 after growth, 1e-3 after a cut

    def prepare(self, context: Context) -> None:
        """Nothing beforehand: a cycle takes its own statistics."""

    def apply(self, model: nn.Module, context: Context, state: None, budget: dict[str, float]) -> Plan:
        """The cut of one cycle, in place; what growth will draw from is kept in the plan."""
        options, cycle, before = self.options(context.options), CycleState(), blocks(model)
        skipped = left_alone(model, options.skip_last, context.exclude)
        # A copy of the generator, so that one ratio does not depend on the ratios before it.
        cut(model, context.batches, options, cycle, context.generator.clone_state(), context.exclude, needed(context, budget))
        return Plan([factorize_step(before, model)], {"grow": {"shares": cycle.shares, "removed": cycle.removed}, "skipped": skipped})

    def regrow(self, model: nn.Module, context: Context, meta: dict[str, Any]) -> Plan:
        """The growth of one cycle, in place, from the `meta` of its cut's plan."""
        cycle = CycleState(*({name: tuple(pair) for name, pair in meta["grow"][key].items()} for key in ("shares", "removed")))
        before = blocks(model)
        grow(model, self.options(context.options), cycle, context.generator)
        return Plan([factorize_step(before, model)])


def needed(context: Context, budget: dict[str, float]) -> tuple[int, int]:
    """(parameters, MACs) that have to go so that `budget` is met."""
    (quantity, ratio), = budget.items()
    index = QUANTITIES.index(quantity)
    current = context.graph.count()[index]
    original = context.original[index] if context.original else current
    missing = max(0, round(current - (1 - ratio) * original))
    return (missing, 0) if index == 0 else (0, missing)


METHODS.register("eigendamage")(EigenDamageMethod("eigendamage"))
METHODS.register("eigendamage_depthwise")(EigenDamageMethod("eigendamage_depthwise", depthwise=True))
METHODS.register("improved_eigendamage")(ImprovedMethod("improved_eigendamage"))
