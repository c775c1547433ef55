"""What the channel criteria share: options, slices of a group, normalisation per layer and aggregation over a group's members.

A channel group of size n has members (parameter, dimension, indices [n, m], role): channel c removes `indices[c]` of that
dimension. A member's slices are that parameter read as a matrix [n, m * rest]. A criterion turns each member into one
non-negative value per channel, v [n]; then

    normalize   v / f(v), where f is 1 (none), the L2 norm (l2), the mean, the maximum or the sum of v over the group's channels
                of that layer; a layer of zeros stays zero
    aggregate   mean, sum or maximum over the members

Magnitudes of different layers have different units, so l1, l2 and geometric_median divide by the layer's mean (the usual remedy
for a global ranking) and average over the producers of a residual stream, so that a long stream is not protected only
because many layers write to it. Estimates of the loss add up over members by their nature and are neither divided nor averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from compress.config import Section
from compress.errors import UserError
from compress.registry import nearest

Normalize = Literal["none", "l2", "mean", "max", "sum"]
Aggregate = Literal["mean", "sum", "max"]
Loss = Callable[[Any, Any], Tensor]
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
Picked = list[tuple[Any, list[Any]]]


class Options(Section):
    """Options of every criterion."""

    missing: Literal["error", "keep"] = Field(
        "error", description="what to do with a group in which the criterion finds nothing to measure: refuse, or keep all its channels")


class LayerOptions(Options):
    """Options of criteria that score each layer of a group by itself."""

    normalize: Normalize = Field("mean", description="divide each layer's scores by this, before members are combined")
    aggregate: Aggregate = Field("mean", description="how the members of a group are combined")


class MagnitudeOptions(LayerOptions):
    """Options of criteria that read weights only."""

    consumers: bool = Field(False, description="also count the slices of the layers that read the channel (role `in`)")


class Criterion:
    """A channel criterion; subclasses set `name`, `needs_data`, `Options` and write `members` and `measure`."""

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    Options: ClassVar[type[Options]] = Options
    lacks: ClassVar[str] = "no convolution or linear layer produces its channels"

    @classmethod
    def score(cls, graph: Any, model: nn.Module, batches: Iterable[tuple[Any, Any]] | None = None, loss_fn: Loss | None = None,
              generator: torch.Generator | None = None, **options: Any) -> dict[str, Tensor]:
        """Scores of every prunable group, `{group name: float64 [size]}` on the CPU; low = remove first.

        Parameters
        ----------
        graph: the channel graph of `model`.
        batches: pairs (inputs, targets) of calibration data, on the model's device; read once. A tuple of inputs is unpacked.
        loss_fn: `loss_fn(outputs, targets)`, a scalar that is the mean over the batch.
        generator: source of all random draws.
        options: the fields of the criterion's `Options`.

        Raises
        ------
        UserError: unknown or invalid options, no data where data is needed, a group with nothing to measure (unless
            `missing="keep"`, which leaves it out of the result), scores that are not finite.
        """
        chosen = cls.parse(options)
        if cls.needs_data and (batches is None or loss_fn is None):
            raise UserError(f"Criterion {cls.name!r} needs calibration batches and a loss function, and got none.")
        picked = cls._pick(graph, model, chosen)
        scores = {}
        for (group, _), value in zip(picked, cls.measure(picked, model, batches, loss_fn, generator, chosen), strict=True):
            value = value.detach().to(device="cpu", dtype=torch.float64)
            if not torch.isfinite(value).all():
                raise UserError(f"Criterion {cls.name!r} gives scores that are not finite numbers for layer {group.name!r}: "
                                "its weights, the calibration data or the loss hold NaN or infinite values.")
            scores[group.name] = value
        return scores

    @classmethod
    def check(cls, graph: Any, model: nn.Module, **options: Any) -> list[str]:
        """The names of the groups that `score` will score. Needs no data; raises what `score` would raise for options and groups."""
        return [group.name for group, _ in cls._pick(graph, model, cls.parse(options))]

    @classmethod
    def members(cls, group: Any, owners: dict[str, nn.Module], options: Any) -> list[Any]:
        """The members of `group` that are measured; `owners` maps the name of a parameter or buffer to the module that holds it."""
        raise NotImplementedError

    @classmethod
    def measure(cls, picked: Picked, model: nn.Module, batches: Any, loss_fn: Any, generator: Any, options: Any) -> Iterable[Tensor]:
        """The scores [size] of each picked group, in order; `picked` holds (group, its measured members)."""
        raise NotImplementedError

    @classmethod
    def _pick(cls, graph: Any, model: nn.Module, options: Any) -> Picked:
        owners = {f"{prefix}.{name}" if prefix else name: module for prefix, module in model.named_modules(remove_duplicate=False)
                  for name in (*module._parameters, *module._buffers)}
        every = [(group, cls.members(group, owners, options)) for group in graph.groups if group.prunable]
        empty = [group.name for group, members in every if not members]
        if empty and options.missing == "error":
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(f"Criterion {cls.name!r} finds nothing to measure in channel group {empty[0]!r}{more} ({cls.lacks}); "
                            f'exclude these layers, use another criterion, or set its option `missing` to "keep".')
        return [(group, members) for group, members in every if members]

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Any:
        """`options` as the criterion's `Options`; every fault becomes one sentence of a UserError."""
        try:
            return cls.Options(**options)
        except ValidationError as error:
            raise UserError(*(_sentence(cls, fault) for fault in error.errors())) from None


def _sentence(criterion: type[Criterion], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = sorted(criterion.Options.model_fields)
        return f"Criterion {criterion.name!r} has no option {key!r}{nearest(key, known)}; known: {', '.join(known)}."
    return f"Option {key!r} of criterion {criterion.name!r} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def slices(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The slices of `tensor` that belong to each channel, float64 [size, m * rest]; `indices` is [size, m]."""
    size, _ = indices.shape
    chosen = tensor.detach().to(torch.float64).index_select(dim, indices.reshape(-1).to(tensor.device))
    return chosen.movedim(dim, 0).reshape(size, -1)


def normalize(values: Tensor, how: Normalize) -> Tensor:
    """`values` [size] divided by their own norm of the kind `how`; unchanged where that norm is 0."""
    norm = {"none": lambda v: v.new_ones(()), "l2": lambda v: v.norm(), "mean": lambda v: v.mean(),
            "max": lambda v: v.max(), "sum": lambda v: v.sum()}[how](values)
    return values if float(norm) == 0 else values / norm


def aggregate(values: list[Tensor], how: Aggregate) -> Tensor:
    """One value per channel [size] out of one per member and channel."""
    stacked = torch.stack(values)
    return {"mean": lambda v: v.mean(0), "sum": lambda v: v.sum(0), "max": lambda v: v.amax(0)}[how](stacked)


class Magnitude(Criterion):
    """Scores each producing layer from its weight slices alone; subclasses write `layer`."""

    Options = MagnitudeOptions

    @staticmethod
    def layer(rows: Tensor) -> Tensor:
        """Scores [size] of one layer from its slices [size, elements]."""
        raise NotImplementedError

    @classmethod
    def members(cls, group, owners, options):
        return [member for member in group.members if member.role == "out" or (options.consumers and member.role == "in")]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        named = tensors(model)
        for _, members in picked:
            yield aggregate([normalize(cls.layer(slices(named[m.parameter], m.dim, m.indices)), options.normalize) for m in members],
                            options.aggregate)
