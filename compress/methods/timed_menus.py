"""Rank menus whose cost is time: a few replacements of every layer are built and measured on the layer's real inputs, on this device.

The time of an option is t(layer) / speedup, both measured in turns. Layers of equal shapes share their measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from compress.decompose.modules import GEOMETRY, Calls, layer_bias, replace_module
from compress.decompose.targets import observe
from compress.methods.layer_times import Times, compare_layers, random_inputs
from compress.methods.menus import Menu, Ranks, front
from compress.methods.timing import Timing

OPTIONS = 12  # replacements measured per layer


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
            inputs = random_inputs(layer, calls[menu.name].shapes, timing.inputs)
            variants = {0: layer} | {option: block(menu, menu.ranks[option]) for option in missing if option}
            dense, speedups = compare_layers({option: (module, inputs) for option, module in variants.items()}, timing)
            known.setdefault((shape, None), dense)
            for option in missing:
                # relative to the layer's first measurement, so that options measured at different times compare
                known.setdefault(keys[option], known[shape, None] / speedups[option])
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
