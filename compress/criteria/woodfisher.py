"""WoodFisher (Singh and Alistarh 2020) for channels: the loss of a channel's weights under F = lambda I + 1/N sum_n g_n g_n^T of N images.

S is the channel's slice in one layer (rows with their biases' weights left out, or columns); losses of members add up. F is the empirical
Fisher matrix (option `fisher`), its inverse is never formed: `compress.curvature.woodfisher`. Option `block`:

    channel   F block-diagonal, a block per channel: 1/2 w_S^T F_SS w_S. The blocks take nothing over from each other, so that no weight
              is updated. Meaningful with few images too, and the scores compare over layers.
    layer     F of the whole layer: 1/2 w_S^T ([F^-1]_SS)^-1 w_S, and the weights that stay are updated. N gradients span N directions; with
              many more weights than that nearly everything can be compensated on these images, and what is left is about
              lambda/2 ||w_S||^2, with lambda set layer by layer: meaningful within a layer (allocation "uniform"), or with as many images
              as a layer has weights; under one threshold for all layers an artefact of the damping.

The paper's blocks are a compromise of this kind: so many consecutive weights of a layer that N gradients still tell something about them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.criteria import CRITERIA, base
from compress.criteria.base import Criterion
from compress.criteria.linearize import check_reached, samples
from compress.criteria.second_order import Compensation, CurvatureOptions, SecondOrder, by_layer, check_loss, losing, modelled
from compress.curvature import woodfisher
from compress.curvature.feed import find_layers
from compress.curvature.per_sample import Visitor, visit
from compress.errors import UserError

Slices = dict[str, list[tuple[Tensor, Any]]]  # of `by_layer`


class WoodFisherOptions(CurvatureOptions):
    """Options of `woodfisher`."""

    fisher: Literal["true", "empirical"] = Field(
        "empirical", description="labels drawn from the network, or the data's labels (as published)"
    )
    block: Literal["channel", "layer"] = Field(
        "channel", description="weights that share a block of the Fisher matrix: one channel's, without any update, or the whole layer's"
    )
    compensation: Compensation = Field(
        "consumer",
        description="with block layer, the layers whose remaining weights are updated: those that read the removed channels, "
        "those that made them, both, or none",
    )
    images: int = Field(256, ge=1, description="gradients of at most so many images, spread evenly over the batches")
    damping: float = Field(0.01, gt=0, description="lambda, as a fraction of the mean diagonal of the Fisher matrix")
    memory: int = Field(512 * 2**20, ge=1, description="with block layer, bytes of gradients held at a time; at least one layer's are held")


@CRITERIA.register("woodfisher")
class WoodFisher(Criterion):
    """Loss of a channel's slices under the layer's Fisher matrix or its blocks."""

    name = "woodfisher"
    needs_data = True
    Options = WoodFisherOptions
    members = SecondOrder.members
    compensates = True

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        check_loss(loss_fn, options.loss)
        scores, slices = by_layer(picked, model)
        measure = _block_losses if options.block == "channel" else _layer_losses
        for score, losses in measure(model, slices, batches, generator, options):
            score += losses.cpu()
        return scores

    @classmethod
    def compensate(
        cls,
        graph: Any,
        model: nn.Module,
        removals: Mapping[Any, Any],
        batches: Iterable[Any],
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        """Updates, in place and jointly per layer, the weights that stay when `graph.prune(model, removals)` removes channels next.

        Does nothing with blocks of single channels.
        """
        chosen = cls.parse(options)
        if chosen.block == "channel":
            return
        gone: dict[str, list[Tensor]] = {}
        for layer, member, channels in losing(graph, model, removals, chosen.compensation):
            weight = model.get_submodule(layer).weight
            gone.setdefault(layer, []).append(places(weight, member.dim, member.indices[channels]).flatten())
        for layer, X in gradient_matrices(model, gone, batches, generator, chosen):
            weight = model.get_submodule(layer).weight
            removed = torch.cat(gone[layer]).unique()
            flat = weight.detach().double().flatten()
            updated = woodfisher.compensate(X, flat, removed, chosen.damping)
            updated[removed] = flat[removed]
            with torch.no_grad():
                weight.copy_(updated.reshape(weight.shape))


def places(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Positions [n, m rest] in the flattened weight of the slices `indices` [n, m] of a dimension."""
    grid = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape).movedim(dim, 0)
    return grid[indices.to(weight.device)].flatten(1)


def _block_losses(model: nn.Module, slices: Slices, batches: Iterable[Any], generator: torch.Generator | None,
                  options: WoodFisherOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """(score, losses [n]) of every slice under its own block; no gradient is kept."""
    weights = {layer: model.get_submodule(layer).weight.detach() for layer in slices}
    squares = {layer: [0] * len(members) for layer, members in slices.items()}
    totals: dict[str, float] = {}

    def add(name: str, gradients: Tensor, _: slice) -> None:
        X = gradients.flatten(1)
        totals[name] = totals.get(name, 0.0) + X.square().sum(dtype=torch.float64).item()
        sums = {dim: woodfisher.projections(X, weights[name], dim) for dim in {member.dim for _, member in slices[name]}}
        for i, (_, member) in enumerate(slices[name]):
            squares[name][i] += sums[member.dim][:, member.indices.to(X.device)].sum(2).square().sum(0)

    chosen = spread(batches, options.images)
    images = _visit(model, chosen, slices, add, generator, options)
    check_reached(layer for layer in slices if layer not in totals)
    for layer, weight in weights.items():
        shift = woodfisher.damping_value(totals[layer], images * weight.numel(), options.damping)
        for square, (score, member) in zip(squares[layer], slices[layer], strict=True):
            yield score, (shift * base.slices(weight, member.dim, member.indices).square().sum(1) + square / images) / 2


def _layer_losses(model: nn.Module, slices: Slices, batches: Iterable[Any], generator: torch.Generator | None,
                  options: WoodFisherOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """(score, losses [n]) of every slice after the rest of its layer is compensated."""
    for layer, X in gradient_matrices(model, slices, batches, generator, options):
        weight, product = model.get_submodule(layer).weight.detach(), woodfisher.gram(X)
        for score, member in slices[layer]:
            members = places(weight, member.dim, member.indices)
            yield score, woodfisher.channel_losses(X, product, weight.flatten(), members, options.damping)


def spread(batches: Iterable[Any], images: int) -> list[Any]:
    """At most `images` (inputs, labels) evenly spaced over all batches: the first ones of a sorted loader would show single classes."""
    batches = list(batches)
    ends = list(itertools.accumulate(samples(inputs) for inputs, _ in batches))
    if not ends or ends[-1] == 0:
        raise UserError("Criterion 'woodfisher' needs calibration images, and got none.")
    if ends[-1] <= images:
        return batches
    chosen = torch.arange(images) * ends[-1] // images
    taken = []
    for (inputs, labels), end in zip(batches, ends, strict=True):
        start = end - samples(inputs)
        own = chosen[(start <= chosen) & (chosen < end)] - start
        if len(own):
            taken.append(tree_map(lambda leaf: leaf[own.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, (inputs, labels)))
    return taken


def gradient_matrices(model: nn.Module, layers: Iterable[str], batches: Iterable[Any], generator: torch.Generator | None,
                      options: WoodFisherOptions) -> Iterator[tuple[str, Tensor]]:
    """(layer, X [N, weights] float32 or float64) of at most `options.images` images, several layers per pass over them."""
    layers = list(layers)
    if not layers:
        return
    chosen = spread(batches, options.images)
    seen = sum(samples(inputs) for inputs, _ in chosen)
    while layers:
        taken, size = [], 0
        while layers:
            size += model.get_submodule(layers[0]).weight.numel() * seen * 4
            if taken and size > options.memory:
                break
            taken.append(layers.pop(0))
        yield from _pass(model, taken, chosen, seen, generator, options).items()


def _pass(
    model: nn.Module, layers: list[str], batches: list[Any], images: int, generator: torch.Generator | None, options: WoodFisherOptions
) -> dict[str, Tensor]:
    matrices: dict[str, Tensor] = {}

    def store(name: str, gradients: Tensor, rows: slice) -> None:
        if name not in matrices:
            matrices[name] = gradients.new_zeros(images, gradients[0].numel())
        matrices[name][rows] = gradients.flatten(1)

    _visit(model, batches, layers, store, generator, options)
    check_reached(layer for layer in layers if layer not in matrices)
    return matrices


def _visit(model: nn.Module, batches: list[Any], layers: Iterable[str], visitor: Visitor, generator: torch.Generator | None,
           options: WoodFisherOptions) -> int:
    with modelled(model, options.loss):
        return visit(
            model, batches, find_layers(model, layers), visitor, fisher=options.fisher, loss=options.loss, generator=generator, bias=False)
