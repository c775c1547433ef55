"""WoodFisher (Singh and Alistarh 2020) for channels: 1/2 w_S^T ([F^-1]_SS)^-1 w_S, F = lambda I + 1/N sum_n g_n g_n^T over a layer.

S is the channel's slice in one layer (rows with their biases' weights left out, or columns); losses of members add up. F is the empirical
Fisher of N images (option `fisher`), its inverse is never formed: `compress.curvature.woodfisher`. The gradients of as many layers as
fit into `memory` are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, Options
from compress.criteria.second_order import Compensation, SecondOrder, layer_of, losing
from compress.curvature import woodfisher
from compress.curvature.feed import find_layers
from compress.curvature.per_sample import visit
from compress.errors import UserError


class WoodFisherOptions(Options):
    """Options of `woodfisher`."""

    fisher: Literal["true", "empirical"] = Field(
        "empirical", description="labels drawn from the network, or the data's labels (as published)"
    )
    side: Literal["producer", "consumer", "both"] = Field(
        "producer", description="score what the channel costs where it is made, where it is read, or both"
    )
    compensation: Compensation = Field(
        "consumer",
        description="layers whose remaining weights are updated: those that read the removed channels, "
        "those that made them, both, or none",
    )
    images: int = Field(256, ge=1, description="gradients of at most so many images (the first ones)")
    damping: float = Field(0.01, gt=0, description="lambda, as a fraction of the mean diagonal of the Fisher matrix")
    memory: int = Field(512 * 2**20, ge=1, description="bytes of gradients held at a time; at least one layer's are held")


@CRITERIA.register("woodfisher")
class WoodFisher(Criterion):
    """OBS loss of a channel's slices under the layer's Fisher matrix."""

    name = "woodfisher"
    needs_data = True
    Options = WoodFisherOptions
    members = SecondOrder.members
    compensates = True

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        name = layer_of(model)
        scores = [torch.zeros(group.size, dtype=torch.float64) for group, _ in picked]
        wanted = dict.fromkeys(name(member) for _, members in picked for member in members)
        for layer, X in gradient_matrices(model, wanted, batches, generator, options):
            weight = model.get_submodule(layer).weight.detach()
            for score, (_, members) in zip(scores, picked, strict=True):
                for member in members:
                    if name(member) == layer:
                        indices = places(weight, member.dim, member.indices)
                        score += woodfisher.channel_losses(X, weight.flatten(), indices, options.damping).cpu()
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
        """Updates, in place and jointly per layer, the weights that stay when `graph.prune(model, removals)` removes channels next."""
        chosen = cls.parse(options)
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


def gradient_matrices(model: nn.Module, layers: Iterable[str], batches: Iterable[Any], generator: torch.Generator | None,
                      options: WoodFisherOptions) -> Iterator[tuple[str, Tensor]]:
    """(layer, X [N, weights] float32 or float64) of the first `options.images` images, several layers per pass over them."""
    layers = list(layers)
    chosen, seen = [], 0
    for inputs, labels in batches if layers else ():
        rest = options.images - seen
        if rest <= 0:
            break
        parts = tuple(part[:rest] for part in inputs) if isinstance(inputs, (tuple, list)) else inputs[:rest]
        chosen.append((parts, labels[:rest]))
        seen += len(chosen[-1][1])
    if layers and not seen:
        raise UserError("Criterion 'woodfisher' needs calibration images, and got none.")
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

    visit(model, batches, find_layers(model, layers), store, fisher=options.fisher, generator=generator, bias=False)
    missing = [layer for layer in layers if layer not in matrices]
    if missing:
        raise UserError(f"Layer {missing[0]!r} is to be scored, but no calibration image reached it; exclude it.")
    return matrices
