"""Rank menus whose cost is time: a few replacements of every layer are built and measured on the layer's real inputs, on this device.

The time of an option is t(layer) / speedup, both measured in turns. Layers of equal shapes share their measurements. A network's time is not the sum of its layers'
(normalisation, activations, caches), so the whole network is measured with the chosen ranks, and what the layers have to save is corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.decompose.modules import GEOMETRY, Calls, layer_bias, replace_module
from compress.decompose.targets import observe
from compress.latency import compare, latency
from compress.methods.menus import Menu, Ranks, front
from compress.methods.timing import BELOW, Timing, met, unreachable
from compress.undisturbed import arguments

OPTIONS = 12  # replacements measured per layer
SHARE = 0.25  # of the network's measuring time that each of them gets
CORRECTIONS = 6
IN_A_ROW = 10  # calls per CUDA measurement: launches then overlap with the device's work, as they do within a network

Times = dict[tuple, float]


class _Repeated(nn.Module):
    """A layer called on each of its inputs, several times over."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, *inputs: Tensor) -> None:
        for _ in range(self.times):
            for x in inputs:
                self.layer(x)


def time_menus(menus: Sequence[Menu], model: nn.Module, block: Callable[[Menu, Ranks], nn.Module], timing: Timing, known: Times) -> list[Menu]:
    """The menus thinned to `OPTIONS` replacements (of those that no other beats in loss and MACs), with a third cost: nanoseconds per forward pass.

    block: a replacement of the layer at given ranks, weights of any values. known: times by shape, added to.
    """
    calls, result = observe(model, timing.inputs), []
    for menu in menus:
        layer, options = model.get_submodule(menu.name), spread(menu)
        shape = _shape(layer, calls[menu.name])
        keys = {option: (shape, menu.ranks[option]) for option in options}
        missing = [option for option in options if keys[option] not in known]
        if missing:
            inputs = _inputs(layer, calls[menu.name], timing.inputs)
            repeats = IN_A_ROW if inputs[0].is_cuda else 1
            candidates = {None: layer} | {option: block(menu, menu.ranks[option]) for option in missing if menu.ranks[option] is not None}
            timed = compare({str(option): _Repeated(module, repeats) for option, module in candidates.items()}, inputs, SHARE * timing.seconds, timing.threads)
            dense = timed["None"].latency.median_ms * 1e6 / repeats
            known.setdefault((shape, None), dense)
            for option in missing:
                # relative to the layer's first measurement, so that options measured at different times compare
                known.setdefault(keys[option], known[shape, None] / timed[str(option if menu.ranks[option] is not None else None)].speedup)
        picked = [(menu.ranks[option], menu.losses[option], (*menu.costs[option][:2], known[keys[option]])) for option in options]
        result.append(replace(menu, ranks=tuple(p[0] for p in picked), losses=tuple(p[1] for p in picked), costs=tuple(p[2] for p in picked)))
    return result


def spread(menu: Menu) -> list[int]:
    """The layer as it is, and `OPTIONS` of its replacements that no other beats in loss and MACs, evenly over their MACs."""
    options = [option for option in front(menu, 1) if menu.ranks[option] is not None]
    if len(options) > OPTIONS:
        low, high = (menu.costs[option][1] for option in (options[0], options[-1]))
        wanted = [low + (high - low) * step / (OPTIONS - 1) for step in range(OPTIONS)]
        options = list(dict.fromkeys(min(options, key=lambda option: abs(menu.costs[option][1] - macs)) for macs in wanted))
    return [0, *options]


def meet(menus: Sequence[Menu], ratio: float, original: nn.Module, current: nn.Module, pick: Callable[[Sequence[Menu], int, float], list[int]],
         build: Callable[[list[int]], nn.Module], timing: Timing) -> tuple[list[int], float]:
    """(option of each menu, measured saving): `ratio` of the original's latency saved by the whole network.

    original: the uncompressed network. current: the one that the menus are of, the same or compressed before. pick: the choice of
    options whose total of a cost is below a limit. build: the network with given options, weights of any values.

    Raises
    ------
    UserError: the fastest network that the menus allow saves less.
    """
    total = latency(original, timing.inputs, timing.seconds, timing.threads).median_ms * 1e6
    before = 0.0 if current is original else timing.saved(original, current)
    dense, least = sum(menu.costs[0][2] for menu in menus), sum(min(cost[2] for cost in menu.costs) for menu in menus)
    asked, tried = ratio, []
    for _ in range(CORRECTIONS):
        limit = dense - (asked - before) * total
        chosen = pick(menus, 2, max(limit, least))
        saved = timing.saved(original, build(chosen)) if any(chosen) else before
        tried.append((chosen, saved))
        if met(saved, ratio):
            return chosen, saved
        if limit <= least and saved < ratio - BELOW:
            raise unreachable(ratio, saved, "the decomposition")
        asked += ratio - saved
    enough = [one for one in tried if one[1] >= ratio - BELOW]
    return min(enough or tried, key=lambda one: abs(one[1] - ratio))


def with_options(model: nn.Module, menus: Sequence[Menu], chosen: Sequence[int], block: Callable[[Menu, Ranks], nn.Module]) -> nn.Module:
    """`model` with the chosen replacements, in place."""
    for menu, option in zip(menus, chosen, strict=True):
        if menu.ranks[option] is not None:
            replace_module(model, menu.name, block(menu, menu.ranks[option]))
    return model


def _shape(layer: nn.Module, calls: Calls) -> tuple:
    """Everything that a layer's time depends on."""
    weights = tuple((tuple(parameter.shape), parameter.dtype) for parameter in layer.parameters())
    return type(layer), tuple(getattr(layer, name, None) for name in GEOMETRY), layer_bias(layer) is None, weights, calls.shapes


def _inputs(layer: nn.Module, calls: Calls, example: Any) -> tuple[Tensor, ...]:
    """Random inputs of the layer's shapes, type and device, channels last where the example is."""
    weight = next(layer.parameters())
    first = arguments(example)[0]
    last = isinstance(first, Tensor) and first.ndim == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(weight) for shape in calls.shapes]
    return tuple(x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x for x in made)
