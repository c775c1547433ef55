"""Widths of channel groups under a budget of time: least measured loss, with the time of layers measured at the widths that come into question.

Time does not follow the number of channels: kernels work on blocks of them (of 16 on many CPUs, of 8 to 64 on GPUs), and 63 channels take as long as 64. So each
group may keep one of a few widths, w = {group: width}, and the convolutions, linear and BatchNorm layers that it runs through are timed as they would then be:
    minimise  sum_g D_g(w_g)    subject to    T(w) = sum_l t_l(sizes of l's tensors at w) <= limit,
D_g the measured loss of cutting g to w_g (`compress.allocate.curves`). For a multiplier m, D_g(w_g) + m T(w) is minimised group by group until nothing changes;
m is bisected, and what is left below the limit is given back, most loss per time first. Times are measured when they are first needed, sizes rounded up to a
sixteenth of the layer's (concatenation makes many); layers of one shape share them. A layer that does not run with other widths by itself counts in
proportion to its weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compress.decompose.targets import observe
from compress.errors import UserError
from compress.graph.adapters import attributes_of
from compress.methods.layer_times import Times, compare_layers, random_inputs
from compress.methods.timing import Timing
from compress.surgery import apply_prune, named_tensors
from compress.undisturbed import undisturbed

LEVELS = 8  # widths of a group, its own included, and the narrowest one
GRID = 16
TOGETHER = 12  # variants of a layer that are held and timed at one time
SWEEPS = 8
BISECTIONS = 40

Kept = dict[str, int]
Sizes = tuple[int, ...]


class _Layer:
    """A layer that groups run through.

    taken: of each (tensor of the layer, dimension) how many of its indices one channel of each group takes. grouped: how convolutions in groups lose channels.
    """

    def __init__(self, module: nn.Module, shapes: tuple[tuple[int, ...], ...], taken: dict[tuple[str, int], dict[str, int]], grouped: dict[str, str]) -> None:
        self.module, self.shapes, self.taken, self.grouped = module, shapes, taken, grouped
        tensors = named_tensors(module)
        self.full: Sizes = tuple(tensors[name].shape[dim] for name, dim in taken)
        # positions in groups must stay a multiple of the groups
        free = getattr(module, "groups", 1) in (1, getattr(module, "out_channels", 0))
        self.units = [max(1, 2 ** round(math.log2(size / GRID))) if free and size > GRID else 1 for size in self.full]
        plain = type(module).__module__.startswith("torch.nn.modules")
        weights = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) for name, tensor in tensors.items())
        self.key = (type(module), module.extra_repr(), weights, shapes, tuple(taken)) if plain else (id(module),)

    def sizes(self, removed: Mapping[str, int]) -> Sizes:
        """Of each dimension in `taken` what is left, rounded up to the grid."""
        left = (full - sum(count * removed.get(group, 0) for group, count in counts.items()) for full, counts in zip(self.full, self.taken.values(), strict=True))
        return tuple(min(full, -(-max(1, size) // unit) * unit) for size, full, unit in zip(left, self.full, self.units, strict=True))

    def share(self, sizes: Sizes) -> float:
        """What is left of the layer's weight."""
        ranks = {name: tensor.ndim for name, tensor in named_tensors(self.module).items()}
        return math.prod(size / full for (name, _), size, full in zip(self.taken, sizes, self.full, strict=True) if ranks[name] > 1 or max(ranks.values()) < 2)

    def at(self, sizes: Sizes, example: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The layer cut to these sizes, and inputs for it; raises whatever the layer raises where it does not run so."""
        layer, shapes, slices, changed = copy.deepcopy(self.module), {}, {}, named_tensors(self.module)
        for (name, dim), size, full in zip(self.taken, sizes, self.full, strict=True):
            if size < full:
                before = tuple(changed[name].shape)
                new = shapes.get(name, (before, before))[1]
                shapes[name] = before, (*new[:dim], size, *new[dim + 1:])
                slices.setdefault(name, {})[str(dim)] = list(range(size, full))
        apply_prune(layer, {"slices": slices, "attributes": {"": attributes_of("", self.module, shapes, self.grouped)}})
        inputs = random_inputs(layer, self.called(layer), example)
        with torch.no_grad(), undisturbed(layer):
            layer(inputs[0])
        return layer, inputs

    def called(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        """The shapes of the inputs of the layer, cut to other widths."""
        channels = next(getattr(layer, name) for name in ("in_channels", "in_features", "num_features") if hasattr(layer, name))
        place = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else 1
        return tuple(tuple(channels if d == place % len(shape) else n for d, n in enumerate(shape)) for shape in self.shapes)


class LayerTimes:
    """T(w): nanoseconds of all layers whose widths the groups decide, for the whole batch.

    known: times by shape, added to.

    Raises
    ------
    UserError: no layer that the groups run through can be timed.
    """

    def __init__(self, graph: Any, model: nn.Module, groups: Sequence[Any], timing: Timing, known: Times) -> None:
        self.full = {group.name: group.size for group in groups}
        self.timing, self.known = timing, known
        self.layers: list[_Layer] = []
        members = [(group.name, member) for group in graph.groups if group.name in self.full for member in group.members]
        for name, calls in observe(model, timing.inputs, (_ConvNd, nn.Linear, _NormBase)).items():
            taken: dict[tuple[str, int], dict[str, int]] = {}
            for group, member in members:
                if member.parameter.startswith(f"{name}."):
                    taken.setdefault((member.parameter.removeprefix(f"{name}."), member.dim), {})[group] = member.indices.shape[1]
            if taken:
                grouped = {key.removeprefix(f"{name}."): way for key, way in graph.grouped.items() if key.startswith(f"{name}.")}
                self.layers.append(_Layer(model.get_submodule(name), calls.shapes, taken, grouped))
        if not self.layers:
            raise UserError("Allocation 'measured' shares time by the layers that channels run through, and none of them can be timed by itself; choose 'global' or 'uniform'.")
        self.touched = {name: [number for number, layer in enumerate(self.layers) if any(name in counts for counts in layer.taken.values())] for name in self.full}

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
            needed.append([(self.layers[number], self.layers[number].sizes(removed)) for number in numbers])
        missing: dict[tuple, tuple[_Layer, dict[Sizes, None]]] = {}
        for entries in needed:
            for layer, sizes in entries:
                if (layer.key, sizes) not in self.known:
                    missing.setdefault(layer.key, (layer, {}))[1][sizes] = None
        for layer, wanted in missing.values():
            for start in range(0, len(wanted), TOGETHER):
                self._measure(layer, list(wanted)[start: start + TOGETHER])
        return [sum(self.known[layer.key, sizes] for layer, sizes in entries) for entries in needed]

    def _measure(self, layer: _Layer, wanted: list[Sizes]) -> None:
        variants = {layer.full: (layer.module, random_inputs(layer.module, layer.shapes, self.timing.inputs))}
        for sizes in wanted:
            if sizes != layer.full:
                try:
                    variants[sizes] = layer.at(sizes, self.timing.inputs)
                except Exception:  # a class of the user that repeats a width somewhere; counted by its weight below
                    continue
        dense, speedups = compare_layers(variants, self.timing)
        dense = self.known.setdefault((layer.key, layer.full), dense)
        for sizes in wanted:
            self.known.setdefault((layer.key, sizes), dense / speedups[sizes] if sizes in speedups else dense * layer.share(sizes))


def choose_widths(groups: Sequence[Any], losses: Mapping[str, Tensor], times: LayerTimes, limit: float) -> Kept:
    """The widths with the least total loss found whose time is at most `limit`; the narrowest ones where even these take longer.

    groups: of an allocation problem, with their permitted widths. losses: what each further channel of a group adds, [size].
    """
    levels = {group.name: ladder(group.widths) for group in groups}
    lost = {group.name: {width: float(losses[group.name][: group.size - width].sum()) for width in levels[group.name]} for group in groups}
    full = {group.name: group.size for group in groups}
    narrow = narrowest(groups)
    if times(narrow) >= limit:
        return narrow
    total = lambda kept: sum(lost[name][width] for name, width in kept.items())  # noqa: E731
    best, low, high = narrow, 0.0, None
    multiplier = (total(narrow) or 1.0) / times(full)
    for _ in range(BISECTIONS):
        kept = _descend(full, levels, lost, times, multiplier)
        if times(kept) <= limit:
            high = multiplier
            best = min(best, kept, key=lambda one: (total(one), -times(one)))
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
    """About `LEVELS` of the permitted widths (descending), the nearest to equal steps of the first, which are powers of two, and the narrowest."""
    size = widths[0]
    unit = max(1, 2 ** round(math.log2(size / LEVELS)))
    wanted = [size, *range((size - 1) // unit * unit, 0, -unit)]
    return sorted({widths[-1], *(min(widths, key=lambda width: (abs(width - want), width)) for want in wanted)}, reverse=True)


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
                if now + more <= limit and gain >= 0:
                    best = max(best or (-1.0, "", 0), (gain / max(more, 1e-6 * now), name, width))
        if best is None:
            return kept
        kept[best[1]] = best[2]
        now = times(kept)
