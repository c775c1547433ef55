"""Low-rank methods: `svd`, `tucker`, `cp` in the Frobenius norm, `kfac_svd`, `kfac_tucker`, `kfac_cp` in the K-FAC norm.

Every Linear and ungrouped Conv2d gets a menu of ranks; a knapsack over estimated ("global") or measured
losses ("measured"), or equal shares ("uniform"), picks one option per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.allocate.outputs import Outputs
from compress.config import Section
from compress.curvature import LayerFactors, collect
from compress.curvature.linalg import damped, power, Spectrum
from compress.curvature.quadratic import channel_moment
from compress.decompose.checks import most_products
from compress.decompose.factors import Factors, merge_core, orthonormalise
from compress.decompose.kfac import DAMPING, kfac_svd, kfac_tucker2, whitened_spectrum
from compress.decompose.kfac_cp import kfac_cp, nested_losses
from compress.decompose.modules import Calls, build_block, dense_weight
from compress.decompose.targets import candidates, observe
from compress.decompose.unweighted import cp, nested_svd, svd, tucker2
from compress.errors import UserError
from compress.methods import METHODS, Context, parse_options
from compress.methods.layer_times import Times
from compress.methods.measured_menus import measure_menus
from compress.methods.menus import Menu, Ranks, build_menu, choose, least, tails, uniform
from compress.methods.timed_menus import time_menus, with_options
from compress.methods.timing import meet
from compress.plan import Plan
from compress.steps.factorize import blocks, factorize_step

QUANTITIES = ("params", "macs")
TOLERANCE = 0.01  # a ratio this close to the largest reachable one counts as reached, as for channels


class PlainOptions(Section):
    """Options of the unweighted decompositions."""


class WeightedOptions(Section):
    """Options of the K-FAC weighted decompositions."""

    fisher: str = Field("true", pattern="^(true|exact|empirical)$", description="labels drawn from the network, all classes weighted, or the data's labels")
    samples: int = Field(1, ge=1, description="labels drawn per image where fisher is true")
    ekfac: bool = Field(True, description="put the layers on one scale by their measured gradient norms (a second pass over the data)")


class CpOptions(WeightedOptions):
    """Options of the K-FAC weighted CP."""

    iterations: int = Field(50, ge=0, description="of the descent on input vectors and kernels; 0 fits the output vectors only")


@dataclass
class Menus:
    """What a method measured once: a menu per layer, second moments by layer; the menus with measured losses and times once they were asked for."""

    estimated: list[Menu]
    moments: dict[str, LayerFactors]
    measured: list[Menu] | None = None
    times: Times = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """One decomposition.

    sides: ranks per layer. products: a sum of products of three vectors where the kernel is larger than 1x1, an SVD of others. factors: of a
    weight at given ranks, from its `LayerFactors` (None where `options` are plain) and the method's options.
    """

    sides: int
    options: type[Section]
    factors: Callable[..., Factors]
    products: bool = False

    @property
    def weighted(self) -> bool:
        """Whether curvature enters."""
        return issubclass(self.options, WeightedOptions)


KINDS = {
    "svd": Kind(1, PlainOptions, lambda w, ranks, entry, options: svd(w, ranks[0])),
    "tucker": Kind(2, PlainOptions, lambda w, ranks, entry, options: _two_if_flat(tucker2(w, ranks))),
    "cp": Kind(1, PlainOptions, lambda w, ranks, entry, options: svd(w, ranks[0]) if flat(w) else cp(w, ranks[0]), products=True),
    "kfac_svd": Kind(1, WeightedOptions, lambda w, ranks, entry, options: kfac_svd(w, entry.A, entry.G, ranks[0])),
    "kfac_tucker": Kind(2, WeightedOptions, lambda w, ranks, entry, options: _two_if_flat(kfac_tucker2(w, entry.A, entry.G, ranks))),
    "kfac_cp": Kind(1, CpOptions, lambda w, ranks, entry, options: _kfac_cp(w, ranks[0], entry, options), products=True),
}


def flat(weight: Tensor) -> bool:
    """Whether the weight is a matrix or a 1x1 kernel."""
    return weight[0, 0].numel() == 1


def _kfac_cp(weight: Tensor, rank: int, entry: LayerFactors, options: CpOptions) -> Factors:
    return kfac_svd(weight, entry.A, entry.G, rank) if flat(weight) else kfac_cp(weight, entry.A, entry.G, rank, options.iterations)


def _two_if_flat(factors: Factors) -> Factors:
    """Two factors where three are never smaller: of matrices and 1x1 kernels."""
    if factors.core[0, 0].numel() > 1:
        return factors
    merged = merge_core(factors.map(torch.Tensor.double))
    if factors.core.ndim == 4:  # one of them has to say that it is a convolution
        merged = Factors(None, merged.input[..., None, None], merged.output)
    return orthonormalise(merged).map(lambda tensor: tensor.to(factors.core.dtype).contiguous())


class RankMethod:
    """Factorizes layers by the decomposition `name`, with ranks chosen under the budget."""

    budgets = (*QUANTITIES, "latency")
    allocations = ("global", "uniform", "measured")
    rounds_widths = True
    by_channels = False

    def __init__(self, name: str) -> None:
        self.name, self.kind = name, KINDS[name]
        self.needs_data = self.kind.weighted

    def check(self, options: dict[str, Any]) -> None:
        """Raise `UserError` for options that the method does not have."""
        self._options(options)

    def _options(self, options: dict[str, Any]) -> Any:
        return parse_options(self.name, self.kind.options, options)

    def prepare(self, context: Context) -> Menus:
        """A menu per layer, and the layers' second moments where the method is weighted."""
        inputs = layer_inputs(context)
        moments: dict[str, LayerFactors] = {}
        if self.kind.weighted:
            options = self._options(context.options)
            moments = collect(context.model, context.batches, layers=list(inputs), fisher=options.fisher, samples=options.samples, bias=False,
                              generator=context.generator, ekfac=options.ekfac)
        return Menus([self._menu(context, name, calls, moments.get(name)) for name, calls in inputs.items()], moments)

    def measured(self, context: Context, state: Menus) -> list[Menu]:
        """The menus with losses measured on `context.model`, once for this state."""
        if state.measured is None:
            reference = Outputs(context.model, context.batches)
            state.measured = measure_menus(state.estimated, context.model, lambda menu, ranks: self._block(context, menu.name, ranks, state), reference)
        return state.measured

    def _block(self, context: Context, name: str, ranks: Ranks, state: Menus, model: nn.Module | None = None) -> nn.Module:
        module = (model or context.model).get_submodule(name)
        return build_block(module, self.kind.factors(dense_weight(module).detach(), ranks, state.moments.get(name), self._options(context.options)))

    def check_budget(self, context: Context, budget: dict[str, float]) -> None:
        """Raise `UserError` where even the smallest ranks keep too much."""
        menus = [self._menu(context, name, calls, None, estimate=False) for name, calls in layer_inputs(context).items()]
        if "latency" in budget:  # what it takes is known once it is measured
            return
        self._limit(context, menus, budget)

    def _limit(self, context: Context, menus: list[Menu], budget: dict[str, float]) -> float:
        """How much of the budgeted quantity the layers of the menus may keep; `UserError` where even the smallest ranks keep more."""
        (quantity, ratio), = budget.items()
        index = QUANTITIES.index(quantity)
        current = context.graph.count()[index]
        original = context.original[index] if context.original else current
        rest, smallest = current - sum(menu.costs[0][index] for menu in menus), least(menus, index)
        reachable = 1 - (rest + smallest) / original
        if reachable < ratio - TOLERANCE:
            raise UserError(f"A budget that removes {ratio:g} of the {quantity} cannot be reached: at most {reachable:.4f} can be removed by {self.name} over {len(menus)} layers.")
        return max((1 - ratio) * original - rest, smallest)

    def apply(self, model: nn.Module, context: Context, state: Menus, budget: dict[str, float]) -> Plan:
        """Factorize layers of `model` in place until `budget` is met."""
        before, meta = blocks(model), {"skipped": candidates(model, context.exclude, observe(model, context.example))[1]}
        menus, chosen, found = self._choice(context, state, budget)
        with_options(model, menus, chosen, lambda menu, ranks: self._block(context, menu.name, ranks, state, model))
        return Plan([factorize_step(before, model)], meta | found)

    def _choice(self, context: Context, state: Menus, budget: dict[str, float]) -> tuple[list[Menu], list[int], dict[str, Any]]:
        """Menus, the option of each that together meet the budget, and what the plan has to say of it."""
        (quantity, ratio), = budget.items()
        pick = uniform if context.allocation == "uniform" else choose
        if quantity != "latency":
            index, limit = QUANTITIES.index(quantity), self._limit(context, state.estimated, budget)
            if limit >= sum(menu.costs[0][index] for menu in state.estimated):
                return state.estimated, [0] * len(state.estimated), {}
        elif ratio == 0:
            return state.estimated, [0] * len(state.estimated), {}
        menus = self.measured(context, state) if context.allocation == "measured" else state.estimated
        if quantity != "latency":
            return menus, pick(menus, index, limit), {}

        block = lambda menu, ranks: self._stand_in(context.model.get_submodule(menu.name), ranks)  # noqa: E731
        menus = time_menus(menus, context.model, block, context.clock(), state.times)
        times = sum(menu.costs[0][2] for menu in menus), least(menus, 2)
        chosen, saved = meet(ratio, context.clock(), context.reference(), context.model, times, lambda limit: pick(menus, 2, limit),
                             lambda chosen: with_options(copy.deepcopy(context.model), menus, chosen, block) if any(chosen) else context.model, self.name)
        return menus, chosen, context.clock().meta(ratio, saved)

    def _stand_in(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The layer's replacement with random weights, which take as long as real ones."""
        weight, generator = dense_weight(module), torch.Generator().manual_seed(0)
        factors = _shape(self.kind, weight, ranks[:1] if flat(weight) else ranks)
        return build_block(module, factors.map(lambda t: torch.randn(t.shape, generator=generator, device="cpu") / t[0].numel() ** 0.5))

    def _menu(self, context: Context, name: str, calls: Calls, entry: LayerFactors | None, estimate: bool = True) -> Menu:
        module = context.model.get_submodule(name)
        weight = dense_weight(module).detach()
        o, c = weight.shape[:2]
        merged = self.kind.sides == 2 and flat(weight)
        if self.kind.sides == 2 and not merged:
            largest: tuple[int, ...] = (o, c)
        elif self.kind.products and not flat(weight):
            largest = (most_products(weight),)
        else:
            largest = (min(o, weight[0].numel()),)
        loss = self._loss(weight, entry) if estimate else lambda ranks: 0.0
        menu = build_menu(name, module, calls, lambda ranks: _shape(self.kind, weight, ranks), largest, loss, context.round_to)
        return replace(menu, ranks=tuple(ranks and ranks * 2 for ranks in menu.ranks)) if merged else menu

    def _loss(self, weight: Tensor, entry: LayerFactors | None) -> Callable[[tuple[int, ...]], float]:
        products = self.kind.products and not flat(weight)
        if products and self.kind.weighted:
            bound = entry.scale() * nested_losses(weight, entry.A, entry.G, largest=saving_rank(weight))
            return lambda ranks: float(bound[min(ranks[0], len(bound) - 1)])
        if self.kind.weighted and self.kind.sides == 1:
            energy = whitened_spectrum(weight, entry.A, entry.G).square()
            left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
            return lambda ranks: 0.5 * entry.scale() * float(left[min(ranks[0], len(left) - 1)])
        dense, factor = weight.double().flatten(2) if weight.ndim == 4 else weight.double()[..., None], 1.0
        if self.kind.weighted:
            root_g, root_c = (power(Spectrum(s.vectors, damped(s, DAMPING)), 0.5) for s in (entry.eigen()[1], _channel_spectrum(entry, weight)))
            dense, factor = torch.einsum("po,ocm,cd->pdm", root_g, dense, root_c), 0.5 * entry.scale()
        else:
            factor = 1 / max(float(dense.square().sum()), torch.finfo(torch.float64).tiny)
        rows, columns = tails(dense.flatten(1)), tails(dense.transpose(0, 1).flatten(1))
        at = lambda tail, r: float(tail[min(r, len(tail) - 1)])  # noqa: E731
        if self.kind.sides == 2 and dense.shape[2] > 1:
            return lambda ranks: factor * min(at(rows, ranks[0]) + at(columns, ranks[1]), float(rows[0]))
        if products:
            rest = cp_bound(weight)
            return lambda ranks: factor * at(rest, ranks[0])
        return lambda ranks: factor * at(rows, ranks[0])


def saving_rank(weight: Tensor) -> int:
    """The largest rank at which products of three vectors have fewer weights than the kernel."""
    return max(1, weight.numel() // (weight.shape[0] + weight.shape[1] + weight[0, 0].numel()))


def cp_bound(weight: Tensor) -> Tensor:
    """Squared error that a CP of rank R does not exceed, [number of terms + 1]: that of the nested SVD, from which `cp` starts."""
    energy = nested_svd(weight.double().flatten(2))[0].square().flip(0).cumsum(0).flip(0)
    return torch.cat([energy, energy.new_zeros(1)])


def _channel_spectrum(entry: LayerFactors, weight: Tensor) -> Spectrum:
    from compress.curvature import eigh

    return eigh(channel_moment(entry.A, weight), f"input moment of layer {entry.name!r}")


def _shape(kind: Kind, weight: Tensor, ranks: tuple[int, ...]) -> Factors:
    """Factors of the right shapes, on the meta device."""
    o, c, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    r = ranks[0]
    with torch.device("meta"):
        if len(ranks) == 2:
            return Factors(torch.empty(ranks[1], c), torch.empty(*ranks, *kernel), torch.empty(o, r))
        if not kernel:
            return Factors(torch.empty(r, c), None, torch.empty(o, r))
        if kind.products and not flat(weight):
            return Factors(torch.empty(r, c), torch.empty(r, 1, *kernel), torch.empty(o, r), depthwise=True)
        return Factors(None, torch.empty(r, c, *kernel), torch.empty(o, r))


def layer_inputs(context: Context) -> dict[str, Calls]:
    """What every layer that may be factorized is called with, in the order of the network's modules."""
    calls = observe(context.model, context.example)
    found = {name: calls[name] for name in candidates(context.model, context.exclude, calls)[0]}
    if not found:
        raise UserError("No layer of this network can be factorized: it needs a Linear or an ungrouped Conv2d that is called, not tied and not excluded.")
    return found


for _name in KINDS:
    METHODS.register(_name)(RankMethod(_name))
