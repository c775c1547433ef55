"""Ranks of all layers under a budget: what each rank of each layer costs and loses, and the cheapest loss overall.

Every target layer has a menu: staying dense, and blocks of several ranks with their parameters, MACs and loss. Chosen is the menu entry that
minimises loss + mu cost per layer, with one multiplier mu bisected until the budget is met; then layers are given back what the budget
leaves over (Shoham and Gersho 1988: the lower convex hull of every menu).

    svd, tucker            loss ||W - W_r||^2 / ||W||^2: relative, so that layers compare
    kfac_svd, kfac_tucker  loss 1/2 tr(G D A D^T), times the EKFAC scale of the layer where it was measured
    cp                     no closed form: the loss of a block grows with the square of the share of MACs and parameters it saves, which
                           gives every layer the same share
Tucker losses are those of the truncated HOSVD in the metric used, an upper bound of what HOOI reaches. Linear and 1x1 layers always get
two factors: a third never pays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.config import Section
from compress.curvature import LayerFactors, collect
from compress.curvature.linalg import Spectrum, damped, eigh, power
from compress.curvature.quadratic import channel_moment
from compress.decompose.factors import Factors
from compress.decompose.kfac import DAMPING, kfac_svd, kfac_tucker2, whitened_spectrum
from compress.decompose.modules import build_block, dense_weight, factors_cost, layer_cost, replace_module
from compress.decompose.rounds import targets
from compress.decompose.unweighted import cp, matricise, svd, tucker2
from compress.errors import UserError

METHODS = ("svd", "tucker", "cp", "kfac_svd", "kfac_tucker")


class RankOptions(Section):
    """Options of the low-rank methods."""

    mode: Literal["output", "input", "spatial"] = Field("output", description="where svd cuts a convolution")
    steps: int = Field(16, ge=2, description="ranks tried per side of a layer")
    skip_last: bool = Field(True, description="leave the last linear layer as it is")
    fisher: Literal["true", "exact", "empirical"] = Field("true", description="kfac: labels drawn from the network, all classes weighted, or the data's labels")
    samples: int = Field(1, ge=1, description="kfac: labels drawn per image where fisher is true")
    positions: int | None = Field(None, ge=1, description="kfac: random positions per image; null: all")
    ekfac: bool = Field(True, description="kfac: scale every layer's loss by its true Fisher trace (a second pass)")


@dataclass(frozen=True)
class Choice:
    """One menu entry; `ranks` is None for the dense layer, (r,) or (r_o, r_c) for a block."""

    ranks: tuple[int, ...] | None
    loss: float
    parameters: int
    macs: int


def grid(largest: int, steps: int) -> list[int]:
    """About `steps` ranks from 1 to `largest`, evenly spaced."""
    return sorted({max(1, round(largest * (i + 1) / steps)) for i in range(steps)})


def statistics(model: nn.Module, batches: Sequence[Any], method: str, options: RankOptions, generator: torch.Generator | None = None,
               exclude: Sequence[str] = ()) -> dict[str, LayerFactors]:
    """Factors of the target layers (for svd, tucker and cp only their input shapes are used). Raises as `collect`."""
    layers = rank_targets(model, options.skip_last, exclude)
    if not layers:
        raise UserError("No layer is left to decompose; low-rank methods need a Linear or an ungrouped Conv2d besides the last linear layer.")
    weighted = method.startswith("kfac")
    if not weighted:
        return collect(model, batches[:1], layers=layers, patch="channel", bias=False, generator=generator)
    return collect(model, batches, layers=layers, bias=False, fisher=options.fisher, samples=options.samples, positions=options.positions,
                   ekfac=options.ekfac, generator=generator)


def rank_targets(model: nn.Module, skip_last: bool = True, exclude: Sequence[str] = ()) -> list[str]:
    """Layers and blocks to decompose, as `rounds.targets`; blocks are decomposed as the product of their factors."""
    return list(targets(model, skip_last, exclude))


def menu(module: nn.Module, method: str, entry: LayerFactors, options: RankOptions) -> list[Choice]:
    """The dense layer first, then every block that is smaller in parameters and MACs.

    Raises
    ------
    UserError: unknown method.
    """
    if method not in METHODS:
        raise UserError(f"Unknown low-rank method {method!r}; known: {', '.join(METHODS)}.")
    weight, dense = dense_weight(module), layer_cost(module, entry.input_shape)
    choices = [Choice(None, 0.0, *dense)]
    for ranks, loss in _losses(weight, method, entry, options):
        cost = factors_cost(module, _shapes(weight, method, ranks, options.mode), entry.input_shape)
        if cost[0] < dense[0] and cost[1] < dense[1]:
            if loss is None:
                loss = (1 - cost[0] / dense[0]) ** 2 * dense[0] + (1 - cost[1] / dense[1]) ** 2 * dense[1]
            choices.append(Choice(ranks, loss, *cost))
    return choices


def _small(weight: Tensor) -> bool:
    return weight[0, 0].numel() == 1


def _losses(weight: Tensor, method: str, entry: LayerFactors, options: RankOptions):
    """(ranks, loss) of every rank tried; loss None where it follows the cost."""
    dense, kfac = weight.double(), method.startswith("kfac")
    scale = entry.scale() if kfac else 1 / max(dense.square().sum().item(), torch.finfo(torch.float64).tiny)
    if method == "cp" and not _small(weight):
        o, c = weight.shape[:2]
        limit = min(o * c, o * weight[0, 0].numel(), c * weight[0, 0].numel())
        yield from (((rank,), None) for rank in grid(limit, options.steps))
        return
    if method.endswith("svd") or _small(weight):
        if kfac:
            energies = whitened_spectrum(weight, entry.A, entry.G).square() / 2
        else:
            energies = torch.linalg.svdvals(matricise(dense, options.mode if not _small(weight) else "output")).square()
        tails = energies.sum() - energies.cumsum(0)
        losses = (((rank,), max(tails[rank - 1].item(), 0.0) * scale) for rank in grid(len(energies), options.steps))
        yield from (((ranks, None) if method == "cp" else (ranks, loss)) for ranks, loss in losses)
        return
    tensor = dense.flatten(2)
    if kfac:
        roots = [power(Spectrum(s.vectors, damped(s, DAMPING)), 0.5) for s in (eigh(entry.G, "G"), eigh(channel_moment(entry.A, weight), "A"))]
        tensor = torch.einsum("po,ocm,cd->pdm", roots[0], tensor, roots[1])
        scale = scale / 2
    u_out, u_in = (torch.linalg.eigh(m @ m.T)[1].flip(1) for m in (tensor.flatten(1), tensor.transpose(0, 1).flatten(1)))
    energy = torch.einsum("ocm,op,cq->pqm", tensor, u_out, u_in).square().sum(2).cumsum(0).cumsum(1)
    for r_out in grid(energy.shape[0], options.steps):
        for r_in in grid(energy.shape[1], options.steps):
            yield (r_out, r_in), max((energy[-1, -1] - energy[r_out - 1, r_in - 1]).item(), 0.0) * scale


def _shapes(weight: Tensor, method: str, ranks: tuple[int, ...], mode: str) -> Factors:
    """The factors of these ranks on the meta device."""
    o, c, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    empty = torch.empty
    with torch.device("meta"):
        if weight.ndim == 2:
            return Factors(empty(ranks[0], c), None, empty(o, ranks[0]))
        if method.endswith("tucker") and len(ranks) == 2:
            return Factors(empty(ranks[1], c), empty(*ranks, *kernel), empty(o, ranks[0]))
        if method == "cp" and not _small(weight):
            return Factors(empty(ranks[0], c), empty(ranks[0], 1, *kernel), empty(o, ranks[0]), depthwise=True)
        if mode == "input" and method.endswith("svd"):
            return Factors(empty(ranks[0], c), empty(o, ranks[0], *kernel), None)
        if mode == "spatial" and method.endswith("svd") and not _small(weight):
            return Factors(None, empty(ranks[0], c, kernel[0], 1), empty(o, ranks[0], 1, kernel[1]))
        return Factors(None, empty(ranks[0], c, *kernel), empty(o, ranks[0]))


def choose(menus: dict[str, list[Choice]], needed: tuple[int, int]) -> dict[str, Choice]:
    """One entry per layer that together save at least `needed` (parameters, MACs per image) at the least total loss found.

    Raises
    ------
    UserError: more than the smallest entries save; says what they save.
    """
    weights = [1 / want if want > 0 else 0.0 for want in needed]

    def cost(choice: Choice) -> float:
        return choice.parameters * weights[0] + choice.macs * weights[1]

    def best(multiplier: float) -> dict[str, Choice]:
        return {name: min(entries, key=lambda entry: (entry.loss + multiplier * cost(entry), cost(entry))) for name, entries in menus.items()}

    def enough(chosen: dict[str, Choice]) -> bool:
        saved = _saved(menus, chosen)
        return saved[0] >= needed[0] and saved[1] >= needed[1]

    smallest = {name: min(entries, key=lambda entry: (cost(entry), entry.loss)) for name, entries in menus.items()}
    if not enough(smallest):
        saved = _saved(menus, smallest)
        raise UserError(f"The smallest ranks save {saved[0]} parameters and {saved[1]} MACs, but {needed[0]} and {needed[1]} are needed; use a smaller ratio.")
    low, high = 0.0, 1e-12
    while not enough(best(high)) and high < 1e18:
        low, high = high, high * 10
    chosen = best(high)
    if not enough(chosen):
        chosen = smallest
    for _ in range(60):
        middle = (low + high) / 2
        trial = best(middle)
        low, high, chosen = (low, middle, trial) if enough(trial) else (middle, high, chosen)
    return _give_back(menus, chosen, needed)


def _saved(menus: dict[str, list[Choice]], chosen: dict[str, Choice]) -> tuple[int, int]:
    return tuple(sum(getattr(menus[name][0], kind) - getattr(entry, kind) for name, entry in chosen.items()) for kind in ("parameters", "macs"))


def _give_back(menus: dict[str, list[Choice]], chosen: dict[str, Choice], needed: tuple[int, int]) -> dict[str, Choice]:
    """Replaces entries by ones of smaller loss, the largest gain first, while the budget still holds."""
    chosen = dict(chosen)
    while True:
        spare = [have - want for have, want in zip(_saved(menus, chosen), needed, strict=True)]
        fitting = [(now.loss - entry.loss, name, entry) for name, now in chosen.items() for entry in menus[name]
                   if entry.loss < now.loss and entry.parameters - now.parameters <= spare[0] and entry.macs - now.macs <= spare[1]]
        if not fitting:
            return chosen
        _, name, entry = max(fitting, key=lambda item: item[:2])
        chosen[name] = entry


def decompose(weight: Tensor, method: str, ranks: tuple[int, ...], entry: LayerFactors, options: RankOptions) -> Factors:
    """The factors of a menu entry."""
    mode = "output" if _small(weight) and options.mode == "spatial" else options.mode
    if len(ranks) == 2:
        return tucker2(weight, ranks) if method == "tucker" else kfac_tucker2(weight, entry.A, entry.G, ranks)
    if method == "cp" and not _small(weight):
        return cp(weight, ranks[0])
    if method.startswith("kfac"):
        return kfac_svd(weight, entry.A, entry.G, ranks[0], mode if method == "kfac_svd" else "output")
    return svd(weight, ranks[0], mode if method == "svd" else "output")


def low_rank(model: nn.Module, batches: Sequence[Any], method: str, needed: tuple[int, int], options: RankOptions | None = None,
             generator: torch.Generator | None = None, exclude: Sequence[str] = (), factors: dict[str, LayerFactors] | None = None) -> dict[str, Choice]:
    """Decomposes the layers of `model` in place so that `needed` (parameters, MACs per image) are saved; returns the chosen entries.

    factors: what `statistics` gave for this very model, to use it for several budgets.

    Raises
    ------
    UserError: unknown method, a budget out of reach, no layer; and as `collect`.
    """
    if method not in METHODS:
        raise UserError(f"Unknown low-rank method {method!r}; known: {', '.join(METHODS)}.")
    options = RankOptions() if options is None else options
    factors = statistics(model, batches, method, options, generator, exclude) if factors is None else factors
    chosen = choose({name: menu(model.get_submodule(name), method, entry, options) for name, entry in factors.items()}, needed)
    for name, choice in chosen.items():
        if choice.ranks is not None:
            module = model.get_submodule(name)
            replace_module(model, name, build_block(module, decompose(dense_weight(module), method, choice.ranks, factors[name], options)))
    return {name: choice for name, choice in chosen.items() if choice.ranks is not None}
