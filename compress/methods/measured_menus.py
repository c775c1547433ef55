"""Losses of rank menus on one scale for all layers: those of the allocation "measured".

The estimates of a menu order the ranks of one layer; between layers, and between decompositions, they do not compare. So each layer is
really replaced, by itself, at a few of its ranks, and the outputs are compared on calibration images (`compress.allocate.outputs`): a few pairs
(estimate e, measured loss D). D is read between them along the power of e that joins two neighbours, beyond them in proportion to e, and
never falls as e rises. Losses of layers are treated as independent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from compress.allocate.outputs import Outputs
from compress.decompose.modules import replace_module
from compress.errors import RunError, cause
from compress.methods.menus import Menu, Ranks, front

SHARES = (0.75, 0.5, 0.25, 0.1, 0.0)  # of the layer's MACs that its measured replacements keep: the last is the cheapest there is
DESTROYED = 1e6  # an infinite or undefined divergence: dearer than anything measured
FLOOR = 1e-12
RANGE = 1e-30  # of the largest estimate
NOISE = 1e-7  # of a divergence computed in float32


def measure_menus(menus: Sequence[Menu], model: nn.Module, block: Callable[[Menu, Ranks], nn.Module], reference: Outputs) -> list[Menu]:
    """The menus with measured losses; the layer as it is costs nothing.

    block: the layer's replacement at given ranks. reference: outputs of `model`, which is not changed.

    Raises
    ------
    RunError: the network does not run with a layer replaced.
    """
    trial = copy.deepcopy(model)
    result = []
    for menu in menus:
        original, points = trial.get_submodule(menu.name), []
        for option in probes(menu):
            replace_module(trial, menu.name, block(menu, menu.ranks[option]))
            try:
                loss = reference.divergence(trial)
            except Exception as error:
                raise RunError(f"With layer {menu.name!r} replaced the network cannot be run ({cause(error)}); exclude the layer if the module around it "
                               "reads its weight.") from error
            points.append((menu.losses[option], loss if math.isfinite(loss) else DESTROYED))
            replace_module(trial, menu.name, original)
        result.append(replace(menu, losses=tuple(0.0 if ranks is None else loss for ranks, loss in zip(menu.ranks, rescale(menu.losses, points), strict=True))))
    return result


def probes(menu: Menu) -> list[int]:
    """The options to measure: of those that no other beats in loss and MACs, the nearest to each of `SHARES`."""
    options = [option for option in front(menu, 1) if menu.ranks[option] is not None]
    if not options:
        return []
    dense = menu.costs[0][1]
    return list(dict.fromkeys(min(options, key=lambda option: abs(menu.costs[option][1] - share * dense)) for share in SHARES))


def rescale(estimates: Sequence[float], points: Sequence[tuple[float, float]]) -> list[float]:
    """D at every estimate from measured points (estimate, D)."""
    if not points:
        return list(estimates)
    # estimates have no scale of their own: those of a converged network are small
    largest = max(*estimates, *(estimate for estimate, _ in points), np.finfo(float).tiny)
    x = np.log(np.maximum([estimate / largest for estimate, _ in sorted(points)], RANGE))
    y = np.maximum.accumulate(np.log(np.maximum([loss for _, loss in sorted(points)], FLOOR)))
    at = np.log(np.maximum(np.array(estimates) / largest, RANGE))
    losses = np.exp(np.interp(at, x, y) + np.minimum(at - x[0], 0.0) + np.maximum(at - x[-1], 0.0))
    # where the measurement says nothing, the estimate orders
    return (losses + NOISE * np.array(estimates) / largest).tolist()
