"""Widths of channel groups under a budget of time: least measured loss, with the time of layers measured at the widths that come into question.

Time does not follow the number of channels: kernels work on blocks of them (of 16 on many CPUs, of 8 to 64 on GPUs), and 63 channels take as long as 64. So each
group may keep one of a few widths, w = {group: width}, and the convolutions, linear and BatchNorm layers that it runs through are timed as they would then be:
    minimise  sum_g D_g(w_g)    subject to    T(w) = sum_l t_l(inputs(w), outputs(w)) <= limit,
D_g the measured loss of cutting g to w_g (`compress.allocate.curves`). For a multiplier m, D_g(w_g) + m T(w) is minimised group by group until nothing changes;
m is bisected, and what is left below the limit is given back, most loss per time first. Times are measured when they are first needed; layers of one shape share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.decompose.targets import observe
from compress.methods.layer_times import Times, compare_layers, random_inputs
from compress.methods.timing import Timing

LEVELS = 8  # widths of a group, its own included
SWEEPS = 8
BISECTIONS = 40

Kept = dict[str, int]


@dataclass(frozen=True)
class _Layer:
    """A layer, the shapes of its inputs, and what each group's removed channels take from its outputs and inputs: {group: channels of the layer each}."""

    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    outputs: dict[str, int]
    inputs: dict[str, int]

    def sizes(self, removed: Mapping[str, int]) -> tuple[int, int]:
        """(outputs, inputs) that are left."""
        out, into = _widths(self.module)
        return tuple(max(1, full - sum(count * removed.get(group, 0) for group, count in part.items())) for full, part in ((out, self.outputs), (into, self.inputs)))

    def key(self) -> tuple:
        """What its time depends on beside its widths."""
        module, free = self.module, tuple(tuple(n for d, n in enumerate(shape) if d != _channel(self.module, shape)) for shape in self.shapes)
        geometry = tuple(getattr(module, name, None) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"))
        return type(module), geometry, _depthwise(module), getattr(module, "bias", None) is None, next(module.parameters()).dtype, free, _widths(module)

    def at(self, out: int, into: int) -> nn.Module:
        """The layer with other widths, its weights as they come."""
        module, weight = self.module, next(self.module.parameters())
        settings = {"device": weight.device, "dtype": weight.dtype}
        with torch.random.fork_rng(devices=[]):
            if isinstance(module, nn.Conv2d):
                return nn.Conv2d(into, out, module.kernel_size, module.stride, module.padding, module.dilation, out if _depthwise(module) else 1,
                                 module.bias is not None, module.padding_mode, **settings)
            if isinstance(module, nn.Linear):
                return nn.Linear(into, out, module.bias is not None, **settings)
            return type(module)(out, **settings)

    def called(self, into: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of its inputs with `into` channels."""
        return tuple(tuple(into if d == _channel(self.module, shape) else n for d, n in enumerate(shape)) for shape in self.shapes)


class LayerTimes:
    """T(w): nanoseconds of all layers whose widths the groups decide, for the whole batch.

    known: times by shape, added to.
    """

    def __init__(self, graph: Any, model: nn.Module, groups: Sequence[Any], timing: Timing, known: Times) -> None:
        self.full = {group.name: group.size for group in groups}
        self.timing, self.known = timing, known
        taken: dict[tuple[str, int], dict[str, int]] = {}
        for group in graph.groups:
            if group.name in self.full:
                for member in group.members:
                    taken.setdefault((member.parameter, member.dim), {})[group.name] = member.indices.shape[1]
        self.layers: list[tuple[_Layer, tuple]] = []
        for name, calls in observe(model, timing.inputs, (nn.Conv2d, nn.Linear, _BatchNorm)).items():
            module = model.get_submodule(name)
            if type(module) in (nn.Conv2d, nn.Linear) and getattr(module, "groups", 1) == 1:
                parts = taken.get((f"{name}.weight", 0), {}), taken.get((f"{name}.weight", 1), {})
            elif _depthwise(module) or (isinstance(module, _BatchNorm) and module.weight is not None):
                parts = (taken.get((f"{name}.weight", 0), {}),) * 2
            else:
                continue
            if any(parts):
                layer = _Layer(module, calls.shapes, *parts)
                self.layers.append((layer, layer.key()))
        self.touched = {name: [number for number, (layer, _) in enumerate(self.layers) if name in layer.outputs or name in layer.inputs] for name in self.full}

    def __call__(self, kept: Kept) -> float:
        """T at these widths."""
        return self._several([kept], range(len(self.layers)))[0]

    def of(self, name: str, widths: Sequence[int], kept: Kept) -> list[float]:
        """The part of T that group `name` decides, at each of `widths` of it, the other groups as in `kept`; what is missing is measured together."""
        return self._several([kept | {name: width} for width in widths], self.touched[name])

    def _several(self, choices: Sequence[Kept], numbers: Sequence[int]) -> list[float]:
        needed = []
        for kept in choices:
            removed = {name: self.full[name] - width for name, width in kept.items() if width != self.full[name]}
            needed.append([(number, self.layers[number][0].sizes(removed)) for number in numbers])
        missing: dict[tuple, tuple[_Layer, set]] = {}
        for entries in needed:
            for number, sizes in entries:
                layer, key = self.layers[number]
                if (key, sizes) not in self.known:
                    missing.setdefault(key, (layer, set()))[1].add(sizes)
        for key, (layer, wanted) in missing.items():
            self._measure(layer, key, sorted(wanted))
        return [sum(self.known[self.layers[number][1], sizes] for number, sizes in entries) for entries in needed]

    def _measure(self, layer: _Layer, key: tuple, wanted: list[tuple[int, int]]) -> None:
        full = layer.sizes({})
        candidates = {full: layer.module} | {sizes: layer.at(*sizes) for sizes in wanted if sizes != full}
        inputs = {sizes: random_inputs(layer.module, layer.called(sizes[1]), self.timing.inputs) for sizes in candidates}
        dense, speedups = compare_layers({sizes: (module, inputs[sizes]) for sizes, module in candidates.items()}, self.timing)
        self.known.setdefault((key, full), dense)
        for sizes in candidates:
            self.known.setdefault((key, sizes), self.known[key, full] / speedups[sizes])


def choose_widths(groups: Sequence[Any], losses: Mapping[str, Tensor], times: LayerTimes, limit: float) -> Kept:
    """The widths with the least total loss found whose time is at most `limit`; the narrowest ones where even these take longer.

    groups: of an allocation problem, with their permitted widths. losses: what each further channel of a group adds, [size].
    """
    levels = {group.name: ladder(group.widths) for group in groups}
    lost = {group.name: {width: float(losses[group.name][: group.size - width].sum()) for width in levels[group.name]} for group in groups}
    full = {group.name: group.size for group in groups}
    narrow = narrowest(groups)
    if times(narrow) > limit:
        return narrow
    total = lambda kept: sum(lost[name][width] for name, width in kept.items())  # noqa: E731
    best, low, high = narrow, 0.0, None
    multiplier = (total(narrow) or 1.0) / times(full)
    for _ in range(BISECTIONS):
        kept = _descend(full, levels, lost, times, multiplier)
        if times(kept) <= limit:
            high = multiplier
            best = min(best, kept, key=total)
        else:
            low = multiplier
        multiplier = 2 * multiplier if high is None else (high / 4 if low == 0 else (low * high) ** 0.5)
        if high is not None and low > 0 and high / low < 1.001:
            break
    return _give_back(best, levels, lost, times, limit)


def narrowest(groups: Sequence[Any]) -> Kept:
    """The least widths that come into question."""
    return {group.name: ladder(group.widths)[-1] for group in groups}


def ladder(widths: Sequence[int]) -> list[int]:
    """`LEVELS` of the permitted widths (descending), the nearest to equal steps of the first, powers of two preferred as steps."""
    size = widths[0]
    unit = max(1, 2 ** round(torch.log2(torch.tensor(size / LEVELS)).item())) if size >= LEVELS else 1
    wanted = [size, *range((size - 1) // unit * unit, 0, -unit)]
    return sorted({min(widths, key=lambda width: (abs(width - want), width)) for want in wanted}, reverse=True)


def _descend(start: Kept, levels: dict[str, list[int]], lost: dict[str, dict[int, float]], times: LayerTimes, multiplier: float) -> Kept:
    """Group by group the width with the least loss plus `multiplier` times the time, the others as they are, until nothing changes."""
    kept = dict(start)
    for _ in range(SWEEPS):
        changed = False
        for name, widths in levels.items():
            width = min(zip(widths, times.of(name, widths, kept), strict=True), key=lambda pair: lost[name][pair[0]] + multiplier * pair[1])[0]
            changed, kept[name] = changed or width != kept[name], width
        if not changed:
            break
    return kept


def _give_back(kept: Kept, levels: dict[str, list[int]], lost: dict[str, dict[int, float]], times: LayerTimes, limit: float) -> Kept:
    """Wider groups as long as the limit holds, those first that gain most loss per time."""
    kept, now = dict(kept), times(kept)
    while True:
        best = None
        for name, widths in levels.items():
            options = [width for width in widths if width >= kept[name]]
            *wider, own = times.of(name, options, kept)
            for width, spent in zip(options, wider):
                gain, more = lost[name][kept[name]] - lost[name][width], spent - own
                if now + more <= limit and gain > 0:
                    best = max(best or (0.0, "", 0), (gain / max(more, 1e-6 * now), name, width))
        if best is None:
            return kept
        kept[best[1]] = best[2]
        now = times(kept)


def _widths(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.num_features, module.num_features


def _depthwise(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels > 1


def _channel(module: nn.Module, shape: tuple[int, ...]) -> int:
    """The dimension of an input that holds the channels."""
    return len(shape) - 1 if isinstance(module, nn.Linear) else len(shape) - 3 if isinstance(module, nn.Conv2d) else 1
