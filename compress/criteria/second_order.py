"""What the second-order channel criteria share: the layers of a group, their curvature, sums over members, compensation.

A channel costs, in the quadratic model of the loss, what its rows cost in every layer that produces it (`side="producer"`, as published) or
what its columns cost in every layer that reads it (`side="consumer"`: where surgery really cuts; a BatchNorm between the two makes these
different things), or both. Losses of members add up. Formulas: `compress.curvature.obs`.

The quadratic model of these criteria is not taken from the given `loss_fn`: it is the Fisher matrix of the option `loss`, the cross-entropy
of the outputs as logits, or half their squared distance ("mse"). Label smoothing leaves that matrix as it is, class weights do not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compress.criteria.base import Criterion, Normalize, Options, Picked, normalize
from compress.curvature import LayerFactors, collect
from compress.curvature.obs import DAMPING, LossModel, compensate_columns, compensate_rows
from compress.errors import UserError

Formula = Callable[[LossModel, Tensor], Tensor]

Compensation = Literal["consumer", "producer", "both", "none"]
ROLES = {"consumer": ("in",), "producer": ("out",), "both": ("out", "in"), "none": ()}


class CurvatureOptions(Options):
    """Options of all criteria that use a Fisher matrix."""

    side: Literal["producer", "consumer", "both"] = Field(
        "producer", description="score what the channel costs where it is made, where it is read, or both"
    )
    loss: Literal["cross_entropy", "mse"] = Field(
        "cross_entropy", description="loss whose curvature is measured: the cross-entropy of logits, or half the squared distance"
    )


class SecondOrderOptions(CurvatureOptions):
    """Options of the criteria that use Kronecker factors."""

    fisher: Literal["true", "exact", "empirical"] = Field(
        "true", description="labels drawn from the network, all classes weighted, or the data's labels"
    )
    samples: int = Field(1, ge=1, description="labels drawn per image where fisher is true")
    positions: int | None = Field(None, ge=1, description="use so many random positions per image for the factors; null: all")
    normalize: Normalize = Field("none", description="divide each group's scores by this; none: as published, losses compare over groups")
    damping: float = Field(DAMPING, ge=0, description="added to the factors' diagonals before inversion, as a fraction of their mean")


class ObsOptions(SecondOrderOptions):
    """Options of the criteria that update the weights that stay."""

    compensation: Compensation = Field(
        "consumer",
        description="layers that are updated: those that read the removed channels (they take over what these carried), those that made "
        "them (as published), both (which corrects the same loss twice), or none",
    )


@dataclass
class LayerView:
    """One layer per group: W [g, o, d] float64 with the bias as last column where A has its row, A [g, d, d], G [g, o, o]."""

    W: Tensor
    A: Tensor
    G: Tensor
    offsets: int
    damping: float

    @cached_property
    def models(self) -> list[LossModel]:
        """The loss of each group's weights."""
        return [LossModel(W, A, G, self.damping) for W, A, G in zip(self.W, self.A, self.G, strict=True)]

    def rows(self, indices: Tensor, formula: Formula) -> Tensor:
        """Scores [n] of channels that own rows `indices` [n, m] of the weight's first dimension."""
        indices = indices.to(self.W.device)
        outputs = self.W.shape[1]
        scores = self.W.new_zeros(len(indices))
        for group in range(len(self.W)):
            mine = indices // outputs == group
            counts = mine.sum(1)
            for count in counts.unique().tolist():
                if count:
                    channels = counts == count
                    own = (indices % outputs)[channels][mine[channels]].reshape(-1, count)
                    scores[channels] += formula(self.models[group], own)
        return scores

    def columns(self, indices: Tensor, formula: Formula) -> Tensor:
        """Scores [n] of channels that own `indices` [n, m] of the weight's second dimension, with all kernel offsets, in every group."""
        own = self.expand(indices)
        return sum(formula(model, own) for model in self.models)

    def expand(self, indices: Tensor) -> Tensor:
        """Columns [n, m kk] of W of input channels [n, m]."""
        indices = indices.to(self.W.device)
        return (indices[..., None] * self.offsets + torch.arange(self.offsets, device=indices.device)).flatten(-2)


def view(module: nn.Module, factors: LayerFactors, damping: float = DAMPING) -> LayerView:
    """The weights of a layer together with its factors (patch "full")."""
    groups = factors.groups
    W = module.weight.detach().double()
    offsets = W[0, 0].numel()
    W = W.reshape(groups, W.shape[0] // groups, -1)
    if factors.bias:
        W = torch.cat([W, module.bias.detach().double().reshape(groups, -1, 1)], 2)
    A, G = (moment.reshape(groups, *moment.shape[-2:]) for moment in (factors.A, factors.G))
    return LayerView(W, A, G, offsets, damping)


def measured(member: Any, owners: Mapping[str, nn.Module]) -> bool:
    """Whether a member is a row or column of the weight of a Linear or Conv2d that is called as a module."""
    owner = owners.get(member.parameter)
    usual = isinstance(owner, (nn.Conv2d, nn.Linear)) and not isinstance(owner, NonDynamicallyQuantizableLinear)
    return usual and member.parameter.rpartition(".")[2] == "weight" and (member.role, member.dim) in (("out", 0), ("in", 1))


def layer_of(model: nn.Module) -> Callable[[Any], str]:
    """Maps a member to the name of its layer in `named_modules` (shared layers have one name there).

    The mapping raises UserError for a layer that has a parameter in common with another one: neither's statistics are the parameter's.
    """
    names = {id(module): name for name, module in model.named_modules()}
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in set(module._parameters.values()) - {None}:
            holders.setdefault(id(parameter), []).append(name)

    def name_of(member: Any) -> str:
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        for parameter in module._parameters.values():
            if len(holders.get(id(parameter), ())) > 1:
                first, second, *_ = holders[id(parameter)]
                raise UserError(f"Layers {first!r} and {second!r} share a parameter, and this criterion measures single layers; "
                                "exclude them, or use the criterion 'taylor_fo' or 'hessian_trace'.")
        return names[id(module)]

    return name_of


def by_layer(picked: Picked, model: nn.Module) -> tuple[list[Tensor], dict[str, list[tuple[Tensor, Any]]]]:
    """(zeros [size] per picked group, layer -> pairs of such a tensor, to which losses are to be added, and the group's member there)."""
    name = layer_of(model)
    scores = [torch.zeros(group.size, dtype=torch.float64) for group, _ in picked]
    pairs: dict[str, list[tuple[Tensor, Any]]] = {}
    for score, (_, members) in zip(scores, picked, strict=True):
        for member in members:
            pairs.setdefault(name(member), []).append((score, member))
    return scores, pairs


def check_loss(loss_fn: Any, loss: str) -> None:
    """UserError where the loss function is the squared error and the curvature to be measured another's."""
    if loss == "cross_entropy" and (loss_fn is functional.mse_loss or isinstance(loss_fn, nn.MSELoss)):
        raise UserError("The loss function is the squared error, and the criterion measures the curvature of the cross-entropy; "
                        'set its option `loss` to "mse".')


@contextmanager
def modelled(model: nn.Module, loss: str) -> Iterator[None]:
    """Refuses, while the network runs inside, outputs of which `loss` is always zero."""

    def check(_: nn.Module, __: tuple, output: Any) -> None:
        if loss == "cross_entropy" and isinstance(output, Tensor) and output.ndim > 1 and output.shape[1] == 1:
            raise UserError("The network gives one output per image, whose cross-entropy as a single class is always zero; "
                            'set the criterion\'s option `loss` to "mse".')

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def losing(graph: Any, model: nn.Module, removals: Mapping[Any, Any], compensation: str) -> Iterator[tuple[str, Any, Tensor]]:
    """(layer, member, channel numbers) of every weight that loses channels and is updated under this choice of `Compensation`.

    removals: group or group name -> channel numbers, as for `graph.prune`.
    """
    by_name = {group.name: group for group in graph.groups}
    owners = {f"{prefix}.{name}" if prefix else name: module for prefix, module in model.named_modules(remove_duplicate=False)
              for name in module._parameters}
    name = layer_of(model)
    for key, removed in removals.items():
        channels = torch.as_tensor(removed, dtype=torch.long).flatten().cpu()
        for member in (by_name[key] if isinstance(key, str) else key).members if len(channels) else ():
            if member.role in ROLES[compensation] and measured(member, owners):
                yield name(member), member, channels


class SecondOrder(Criterion):
    """Base of the Kronecker criteria; subclasses set `rows` and `columns`, the formulas of their scores, OBS kinds also `compensates`."""

    needs_data = True
    Options = SecondOrderOptions
    compensates = False
    rows: ClassVar[Formula]
    columns: ClassVar[Formula]

    @classmethod
    def members(cls, group, owners, options):
        return [member for member in group.members if member.role in ROLES[options.side] and measured(member, owners)]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        check_loss(loss_fn, options.loss)
        scores, pairs = by_layer(picked, model)
        factors = statistics(model, batches, pairs, generator, options)
        for layer, own in pairs.items():
            current = view(model.get_submodule(layer), factors.pop(layer), options.damping)
            for score, member in own:
                losses = current.rows(member.indices, cls.rows) if member.role == "out" else current.columns(member.indices, cls.columns)
                score += losses.cpu()
        return [normalize(score, options.normalize) for score in scores]

    @classmethod
    def compensate(
        cls,
        graph: Any,
        model: nn.Module,
        removals: Mapping[Any, Any],
        batches: Iterable[Any],
        generator: torch.Generator | None = None,
        known: dict[str, LayerFactors] | None = None,
        **options: Any,
    ) -> None:
        """Updates the weights that stay, in place, for the channels that `graph.prune(model, removals)` will remove next.

        Does nothing for criteria without compensation (`compensates`). `known`: factors by layer of a network with these very weights; those
        that are missing are measured and added. See `compensate`.
        """
        if cls.compensates:
            compensate(graph, model, removals, batches, generator, cls.parse(options), {} if known is None else known)


def statistics(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], generator: torch.Generator | None, options: Any
) -> dict[str, LayerFactors]:
    """Full-patch factors of the layers with the criterion's options."""
    with modelled(model, options.loss):
        return collect(model, batches, layers=layers, fisher=options.fisher, samples=options.samples, positions=options.positions,
                       loss=options.loss, generator=generator)


def compensate(
    graph: Any, model: nn.Module, removals: Mapping[Any, Any], batches: Iterable[Any], generator: torch.Generator | None, options: Any,
    known: dict[str, LayerFactors],
) -> None:
    """Joint OBS update of the layers that lose columns (through A) or rows (through G), as `options.compensation` says, in place.

    All channels of one layer are compensated together: kept columns take over what the removed ones carried (least squares on the
    layer's real inputs; the bias takes part), kept rows what the removed ones did to the loss. Removed entries are left as they are:
    surgery cuts them. `removals` as for `losing`; `known` as for `SecondOrder.compensate`.
    """
    removed: dict[str, dict[str, Tensor]] = {}
    for layer, member, channels in losing(graph, model, removals, options.compensation):
        roles = removed.setdefault(layer, {})
        earlier = roles.get(member.role, torch.zeros(0, dtype=torch.long))
        roles[member.role] = torch.cat([earlier, member.indices[channels].flatten()]).unique()
    missing = [layer for layer in removed if layer not in known]
    if missing:
        known |= statistics(model, batches, missing, generator, options)
    for layer, roles in removed.items():
        module = model.get_submodule(layer)
        current = view(module, known[layer])
        _update(module, current, roles, options.damping)


def _update(module: nn.Module, current: LayerView, roles: dict[str, Tensor], damping: float) -> None:
    groups, outputs, width = current.W.shape
    updated = []
    for group, (W, A, G) in enumerate(zip(current.W, current.A, current.G, strict=True)):
        kept = torch.ones_like(W, dtype=torch.bool)
        new = W
        if "in" in roles:
            columns = current.expand(roles["in"])
            kept[:, columns] = False
            new = compensate_columns(new, A, columns, damping)
        if "out" in roles:
            rows = roles["out"].to(W.device)
            rows = rows[rows // outputs == group] % outputs
            if 0 < len(rows) < outputs:
                kept[rows] = False
                new = compensate_rows(new, G, rows, damping)
        updated.append(torch.where(kept, new, W))
    stacked = torch.stack(updated).reshape(groups * outputs, width)
    with torch.no_grad():
        weights = module.weight[0].numel()
        module.weight.copy_(stacked[:, :weights].reshape(module.weight.shape))
        if width > weights:
            module.bias.copy_(stacked[:, weights])
