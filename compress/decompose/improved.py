"""Improved EigenDamage (the repository of the EigenDamage table): ranks from the eigenbasis, subspaces from Tucker-2, cut and growth.

One cycle: CUT takes statistics, scores rows and columns in the eigenbasis (EKFAC second moments, optionally a spatial third factor),
thresholds them globally, and replaces every layer by a decomposition at the ranks that are left; the caller fine-tunes; GROW gives a part
of the removed capacity back where the most saliency was lost; the caller fine-tunes at ten times the rate.

Symbols as in `eigen`; K [kk, kk] second moment over kernel offsets, so that A ~= C (x) K. Shares: what a layer's removed rows (columns)
held of the saliency removed in the whole cycle; kept as a moving average with `pool_momentum`.

`ImprovedOptions.published()` gives the published run, the defaults repair it: statistics are plain averages in evaluation mode, EKFAC
uses all data, every side is normalised by its own sum, growth keeps the function (a copied filter, as published, doubles its component),
biases are exact at padded borders, dilation and padding are forwarded.
Note that Tucker-2 commutes with rotations: the published method uses the curvature for the ranks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compress.config import TrainConfig
from compress.curvature import LayerFactors, collect, ekfac, eigh
from compress.curvature.linalg import Spectrum, kron
from compress.curvature.quadratic import channel_moment, nearest_kronecker, spatial_moment
from compress.decompose.eigen import merge_outer, rotate
from compress.decompose.factors import Factors
from compress.decompose.modules import build_block, replace_module
from compress.decompose.reach import round_choice, saved
from compress.decompose.rounds import EigenDamageOptions, Scored, apply_round, first_inputs, proposal, rejected
from compress.decompose.selection import Sides
from compress.decompose.targets import BLOCKS, observe, targets
from compress.decompose.unweighted import cp, svd, tucker2
from compress.errors import UserError

STALLED = 0.01  # of the parameters: a cycle that removes less switches `allow_increase` on where that is "auto" (as published)


class ImprovedOptions(EigenDamageOptions):
    """Options of Improved EigenDamage; the defaults are the corrected method, `published()` the published run."""

    pool_fraction: float = Field(0.2, ge=0, lt=1, description="share of all scores that one cycle removes; as for EigenDamage")
    cap: float = Field(0.5, gt=0, le=1, description="largest fraction of a layer's rows, or columns, that one cycle removes")
    rounds: int | None = Field(None, ge=1, description="cycles at most (published: 50, a cut and a growth each); null: prune.rounds")
    skip_last: bool = Field(False, description="leave the last linear layer as it is")
    decomposition: Literal["usual", "tucker", "cp", "svd"] = Field(
        "tucker",
        description="coordinates of the eigenbasis, Tucker-2, CP with a depthwise core, or the output SVD; the last two run one cycle",
    )
    spatial: Literal["none", "nearest", "partial_trace"] = Field(
        "none", description="third factor over kernel offsets: none (channels only), of the nearest Kronecker product, or of partial traces"
    )
    eigenvalues: Literal["all", "first_batch", "products"] = Field(
        "all", description="EKFAC second moments from all data, from the first batch (as published), or products of eigenvalues")
    moving_average: float | None = Field(None, gt=0, lt=1, description="moving average over batches (published: 0.9); null: plain average")
    training_mode: bool = Field(False, description="take the statistics in training mode (as published)")
    damping: float = Field(
        0.0, ge=0, description="Tikhonov damping, split over the factors (published: 1e-3); acts on products of eigenvalues only"
    )
    back_ratio: float = Field(0.25, ge=0, lt=1, description="share of the removed rows and columns that growth gives back")
    pool_momentum: float = Field(0.5, ge=0, lt=1, description="weight of earlier cycles in the shares that growth draws from")
    growth: Literal["preserving", "copy"] = Field(
        "preserving", description="new filters that leave the function as it is, or copies of the last one (as published)"
    )
    growth_lr_factor: float = Field(10.0, gt=0, description="learning rate of the fine-tuning after growth, in that of the one after a cut")
    growth_milestones: list[float] | None = Field(
        None, description="milestones of the fine-tuning after growth (published: 0.25, 0.5, 0.75 with gamma 0.1); null: those after a cut"
    )
    allow_increase: bool | Literal["auto"] = Field(
        False,
        description="replace layers even where they get no smaller; auto: from the cycle on that follows one which removed less than 1 % of the "
        "parameters (as published)",
    )

    @field_validator("growth_milestones")
    @classmethod
    def _milestones(cls, value: list[float] | None) -> list[float] | None:
        return value if value is None else TrainConfig(milestones=value).milestones

    @field_validator("ekfac", "depthwise")
    @classmethod
    def _of_eigendamage(cls, value: bool) -> bool:
        raise ValueError("Improved EigenDamage has `eigenvalues` and `decomposition` instead")

    @staticmethod
    def published(**changes: Any) -> ImprovedOptions:
        """The published configuration."""
        return ImprovedOptions(
            **{
                "eigenvalues": "first_batch",
                "moving_average": 0.9,
                "training_mode": True,
                "damping": 1e-3,
                "growth": "copy",
                "accept": "params",
            }
            | changes
        )

    def accepts(self, old: tuple[int, int], new: tuple[int, int], full: bool) -> bool:
        """As for EigenDamage, and with `allow_increase` whatever was cut ("auto" counts as allowed; `cut` decides it)."""
        return super().accepts(old, new, full) or (bool(self.allow_increase) and not full)

    @property
    def form(self) -> str:
        """Shape of the blocks."""
        return {"cp": "depthwise", "svd": "output"}.get(self.decomposition, "three")

    def unsplit(self) -> Self:
        """The same options for a layer that stays in three factors."""
        return self.model_copy(update={"depthwise": False, "decomposition": "tucker"})


@dataclass
class CycleState:
    """What one cycle leaves to its growth and to the next cycle."""

    shares: dict[str, tuple[float, float]] = field(default_factory=dict)  # of removed saliency (row, column) per layer; growth draws by them
    removed: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows and columns of every layer, by the last cut
    rejected: dict[str, str] = field(default_factory=dict)  # layers that the last cut left as they were, with the reason
    saved: tuple[int, int] = (0, 0)  # parameters and MACs per image, by the last cut
    stalled: bool = False  # whether a cut removed less than STALLED of the parameters


def tikhonov(A: Spectrum, G: Spectrum, epsilon: float, K: Spectrum | None = None) -> tuple[Spectrum, ...]:
    """Spectra with the published damping: sqrt(eps pi) on A and sqrt(eps / pi) on G, pi = sqrt(mean a / mean g); with three factors
    eps^(1/3) pi_x, pi_x = (f_x^2 / (f_y f_z))^(1/3) and f the mean eigenvalues. Zero factors are damped as if their mean were one."""
    spectra = [A, G] if K is None else [A, G, K]
    means = [spectrum.values.mean().item() or 1.0 for spectrum in spectra]
    if K is None:
        pi = (means[0] / means[1]) ** 0.5
        shifts = [(epsilon * pi) ** 0.5, (epsilon / pi) ** 0.5]
    else:
        product = means[0] * means[1] * means[2]
        shifts = [epsilon ** (1 / 3) * (mean**3 / product) ** (1 / 3) for mean in means]
    return tuple(Spectrum(spectrum.vectors, spectrum.values + shift) for spectrum, shift in zip(spectra, shifts, strict=True))


def cycle_scores(model: nn.Module, batches: Sequence[Any], options: ImprovedOptions, generator: torch.Generator | None = None,
                 exclude: Sequence[str] = (), example: Any = None) -> dict[str, Scored]:
    """Statistics and importances of every target layer that the network calls. `example` and errors as for `rounds.scores`."""
    calls = observe(model, first_inputs(batches) if example is None else example)
    sources = targets(model, options.skip_last, exclude, calls)
    if not sources:
        raise UserError("No layer is left to decompose; Improved EigenDamage needs a Linear or an ungrouped Conv2d.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    passes = {"fisher": options.fisher, "samples": options.samples, "generator": generator, "training": options.training_mode}
    factors = collect(model, batches, layers=sources.values(), bias=False, decay=options.moving_average, **passes,
                      patch="full" if options.spatial != "none" else "channel" if options.use_patch else "pixel")
    spatial = {source: _third_factor(entry, model.get_submodule(source).weight, options) for source, entry in factors.items()}
    if options.eigenvalues != "products":
        ekfac(model, batches if options.eigenvalues == "all" else batches[:1], factors, **passes)
    found = {}
    for name, source in sources.items():
        module, entry = model.get_submodule(name), factors[source]
        weight = model.get_submodule(source).weight.detach()
        channel, offsets = spatial[source]
        spectra = (channel, entry.eigen()[1])
        found[name] = Scored(module, weight, spectra, _importance(weight, spectra, offsets, entry.second, options), calls[name])
    return found


def _third_factor(entry: LayerFactors, weight: Tensor, options: ImprovedOptions) -> tuple[Spectrum, Spectrum | None]:
    """(channel spectrum, spatial spectrum or None); with a third factor the entry's own basis becomes their Kronecker product."""
    if options.spatial == "none" or weight.ndim == 2:
        return entry.eigen()[0], None
    if options.spatial == "nearest":
        C, K = nearest_kronecker(entry.A, weight)
    else:
        C, K = channel_moment(entry.A, weight), spatial_moment(entry.A, weight)
    channel, offsets = eigh(C, f"channel moment of layer {entry.name!r}"), eigh(K, f"spatial moment of layer {entry.name!r}")
    joint = Spectrum(kron(channel.vectors, offsets.vectors), (channel.values[:, None] * offsets.values).flatten())
    entry._eigen = (joint, entry.eigen()[1])
    return channel, offsets


def _importance(
    weight: Tensor, spectra: tuple[Spectrum, Spectrum], offsets: Spectrum | None, second: Tensor | None, options: ImprovedOptions
) -> Sides:
    rotated = rotate(weight, spectra[0].vectors, spectra[1].vectors).reshape(*weight.shape[:2], -1)
    if offsets is not None:
        rotated = rotated @ offsets.vectors
    if second is None:
        damped = (
            tikhonov(*spectra, options.damping, offsets) if options.damping else (*spectra, *([offsets] if offsets is not None else []))
        )
        second = damped[1].values[:, None] * damped[0].values
        if offsets is not None:
            second = second[..., None] * damped[2].values
    theta = (rotated.square() * second.reshape(*weight.shape[:2], -1)).sum(2)
    return Sides(theta.sum(1), theta.sum(0))


def cycle_proposal(scored: Scored, kept: Sides, options: ImprovedOptions) -> Factors:
    """The decomposition at the ranks that are left, merged into the outer factors of a block."""
    r_out, r_in = len(kept.rows), len(kept.columns)
    weight, kernel = scored.weight, scored.weight[0, 0].numel()
    if options.decomposition == "usual":
        return proposal(scored, kept, options)
    if options.decomposition == "svd":
        inner = svd(weight, min(r_out, r_in) if weight.ndim == 2 else min(r_out, weight[0].numel()))
    elif options.decomposition == "cp" and kernel > 1:
        inner = cp(weight, min(r_out, r_in))
    else:
        inner = tucker2(weight, (r_out, r_in))
    return merge_outer(scored.module.factors(), inner) if isinstance(scored.module, BLOCKS) else inner


def cut(model: nn.Module, batches: Sequence[Any], options: ImprovedOptions, state: CycleState, generator: torch.Generator | None = None,
        exclude: Sequence[str] = (), needed: tuple[int, int] | None = None, example: Any = None) -> list[str]:
    """The CUT phase, in place; returns the replaced layers and updates `state`.

    needed: (parameters, MACs per image) to save; the threshold is then bisected. `example` as for `rounds.scores`. Raises as
    `rounds.eigendamage_round`.
    """
    scored = cycle_scores(model, batches, options, generator, exclude, example)
    if options.allow_increase == "auto":
        options = options.model_copy(update={"allow_increase": state.stalled})
    choice = round_choice(scored, options, needed)
    kept, split = choice
    state.saved = saved(scored, choice, options)
    if needed is None or any(needed):  # a budget that was met before is no stall
        state.stalled |= state.saved[0] < STALLED * sum(parameter.numel() for parameter in model.parameters())
    changed = apply_round(model, scored, kept, options, cycle_proposal, split)
    state.rejected = rejected(scored, kept, changed)
    _remember(state, scored, {name: kept[name] for name in changed}, options.pool_momentum)
    return changed


def _remember(state: CycleState, scored: dict[str, Scored], kept: dict[str, Sides], momentum: float) -> None:
    """Moving averages of the shares of removed saliency; layers that were left alone leave the pool."""
    lost = {}
    for name, sides in kept.items():
        entry = scored[name].sides
        lost[name] = tuple(
            (side.sum() - side[index.to(side.device)].sum()).clamp_min(0).item() for side, index in zip(entry, sides, strict=True)
        )
    total = sum(map(sum, lost.values())) or 1.0
    old = state.shares
    state.shares = {
        name: tuple(
            momentum * before + (1 - momentum) * value / total for before, value in zip(old.get(name, (0.0, 0.0)), values, strict=True)
        )
        for name, values in lost.items()
    }
    state.removed = {
        name: tuple(side.numel() - len(index) for side, index in zip(scored[name].sides, sides, strict=True))
        for name, sides in kept.items()
    }


def check_growth(options: ImprovedOptions) -> None:
    """Raise `UserError` for a decomposition that cannot grow although it should."""
    if options.back_ratio and options.decomposition not in ("usual", "tucker"):
        raise UserError(f"The decomposition {options.decomposition!r} of Improved EigenDamage cannot grow; set back_ratio to 0 or use one cycle.")


def grow(model: nn.Module, options: ImprovedOptions, state: CycleState, generator: torch.Generator | None = None) -> int:
    """The GROW phase, in place: floor(back_ratio * removed) rows and columns, drawn with replacement by the shares.

    Returns how many were added. A side never grows beyond the layer's own width; draws above that are dropped and not drawn again, so that
    the other layers grow by their own shares and no more.

    Raises
    ------
    UserError: a decomposition that cannot grow (cp, svd).
    """
    check_growth(options)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    places = [(name, side) for name in state.shares for side in (0, 1)]
    weights = torch.tensor([state.shares[name][side] for name, side in places], dtype=torch.float64)
    count = int(options.back_ratio * sum(map(sum, state.removed.values())))
    if not count or not weights.sum() > 0:
        return 0
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    added = 0
    for position, times in zip(*drawn.unique(return_counts=True), strict=True):
        name, side = places[int(position)]
        block = model.get_submodule(name)
        factors = block.factors()
        limit = (factors.output.shape[0], factors.input.shape[1])[side] - factors.ranks[side]
        for _ in range(min(int(times), limit)):
            factors = _grown(factors, side, options.growth, generator)
            added += 1
        new = build_block(block, factors)
        for mine, theirs in zip(new.parameters(), block.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        replace_module(model, name, new)
    return added


def _grown(factors: Factors, side: int, growth: str, generator: torch.Generator) -> Factors:
    """One more row (side 0: core filter and output column) or column (side 1: input row and core slice)."""
    core, dim = factors.core, side
    outer = factors.output.T if side == 0 else factors.input
    if growth == "copy":
        core_slice, outer_row = core.narrow(dim, core.shape[dim] - 1, 1), outer[-1:]
    else:
        # a new direction on the side that reads, zero on the side that writes: the function stays, and gradients reach both
        draw = torch.randn(
            core.narrow(dim, 0, 1).shape if side == 0 else outer[:1].shape,
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        draw = draw.to(core)
        if side == 0:
            norms = core.flatten(1).norm(dim=1).mean()
            core_slice, outer_row = draw / draw.norm() * norms, torch.zeros_like(outer[:1])
        else:
            basis = torch.linalg.qr(outer.T.double())[0].to(outer)
            draw = draw - (draw @ basis) @ basis.T
            outer_row, core_slice = draw / draw.norm() * outer.norm(dim=1).mean(), torch.zeros_like(core.narrow(dim, 0, 1))
    core, outer = torch.cat([core, core_slice], dim), torch.cat([outer, outer_row])
    return Factors(factors.input, core, outer.T.contiguous()) if side == 0 else Factors(outer, core, factors.output)
