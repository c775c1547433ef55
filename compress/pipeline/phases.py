"""The rounds of an entry: cuts on the way to the ratio, and growth between them where the method gives capacity back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compress import methods
from compress.config import Config, FinetuneConfig
from compress.errors import Unreachable, UserError
from compress.methods import Context
from compress.plan import Plan
from compress.schedule import sparsity_at


@dataclass(frozen=True)
class Phase:
    """A change of the network that is followed by fine-tuning: a cut to `ratio`, or growth (`ratio` None).

    open: a cut that ends the rounds where it meets its ratio. milestones: those of this fine-tuning; None: those of every other.
    """

    name: str
    ratio: float | None
    lr_factor: float = 1.0
    milestones: list[float] | None = None
    open: bool = False

    def tuning(self, finetune: FinetuneConfig) -> FinetuneConfig:
        """The fine-tuning after this change."""
        own = {} if self.milestones is None else {"milestones": self.milestones}
        return finetune.model_copy(update={"lr": finetune.lr * self.lr_factor, **own})

    def change(self, method: str, model: nn.Module, context: Context, state: Any, quantity: str) -> Plan:
        """Cut or grow `model`, in place. Unreachable: a latency that measuring shows to be out of reach; every other budget was checked before."""
        if self.ratio is None:
            return methods.method(method).regrow(model, context)
        try:
            return methods.carry_out(method, model, context, state, {quantity: self.ratio})
        except UserError as error:
            if quantity != "latency":
                raise
            raise Unreachable(str(error)) from error

    def ends(self, plan: Plan) -> bool:
        """Whether no further round is needed after this one, which made `plan`."""
        return self.open and "missing" not in plan.meta


def phases(config: Config, method: str, ratio: float) -> list[Phase]:
    """The rounds of an entry in order; an open one may end them early."""
    chosen, options = methods.method(method), config.prune.method_options.get(method, {})
    rounds = (chosen.rounds(options) if hasattr(chosen, "rounds") else None) or config.prune.rounds
    stepwise = hasattr(chosen, "stepwise") and chosen.stepwise(options)
    growth = chosen.growth(options) if hasattr(chosen, "growth") else None
    result = []
    for number in range(1, rounds + 1):
        share = ratio if stepwise else sparsity_at(config.prune.schedule, number / rounds, ratio)
        result.append(Phase(f"round{number}", share, open=stepwise))
        if number < rounds and growth is not None:
            result.append(Phase(f"round{number}-growth", None, *growth))
    return result
