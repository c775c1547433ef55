"""Oracle: the masked original, written without the toolkit's verifier; and dead channels planted by hand.

`masked(model, group removals)` is a deep copy whose weights are zero in every slice that reads a removed channel. `kill(model, ...)`
zeroes the producers instead (weights and biases of removed channels), for networks in which nothing lies between producer and consumer
that turns a zero into something else.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from compress.graph import ChannelGraph, ChannelGroup

Removals = dict[ChannelGroup, Tensor]


def choose(graph: ChannelGraph, generator: torch.Generator, share: float = 0.5) -> Removals:
    """Random channels of every prunable group."""
    removals = {}
    for group in graph.groups:
        if group.prunable:
            amount = min(group.size - 1, max(1, round(share * group.size)))
            removals[group] = torch.randperm(group.size, generator=generator)[:amount]
    return removals


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def masked(model: nn.Module, removals: Removals) -> nn.Module:
    """The original with the removed channels zeroed where they are read."""
    model = copy.deepcopy(model)
    known = tensors(model)
    for group, channels in removals.items():
        for member in group.members:
            if member.role == "in":
                tensor = known[member.parameter]
                keep = torch.ones(tensor.shape[member.dim], dtype=tensor.dtype)
                keep[member.indices[channels].reshape(-1)] = 0
                shape = [1] * tensor.dim()
                shape[member.dim] = -1
                tensor.data = tensor.data * keep.view(shape)
    return model


def kill(model: nn.Module, removals: Removals) -> None:
    """Zeroes what produces the removed channels, in place."""
    known = tensors(model)
    for group, channels in removals.items():
        for member in group.members:
            if member.role != "in":
                known[member.parameter].data.index_fill_(member.dim, member.indices[channels].reshape(-1), 0)


def outputs(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """All output tensors in evaluation mode."""
    with torch.no_grad():
        return [leaf for leaf in tree_flatten(model.eval()(*inputs))[0] if isinstance(leaf, Tensor)]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest entry of `a`."""
    assert [x.shape for x in a] == [y.shape for y in b]
    scale = max(float(x.abs().max()) for x in a if x.numel())
    return max(float((x - y).abs().max()) for x, y in zip(a, b) if x.numel()) / max(scale, 1e-300)


def randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random normalisation statistics and affine parameters, so that no comparison is vacuous."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                if module.weight is not None:
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return model
