"""Times of single layers on inputs of their real shapes: several variants of a layer in turns, relative to the layer as it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.latency import compare
from compress.methods.timing import Timing
from compress.undisturbed import arguments

SHARE = 0.25  # of a network's measuring time that each variant of a layer gets
IN_A_ROW = 10  # calls per CUDA measurement: launches then overlap with the device's work, as they do within a network

Times = dict[tuple, float]
Key = TypeVar("Key", bound=Hashable)


class _Run(nn.Module):
    """A layer called on inputs of its own, several times over."""

    def __init__(self, layer: nn.Module, inputs: tuple[Tensor, ...], times: int) -> None:
        super().__init__()
        self.layer, self.inputs, self.times = layer, inputs, times

    def forward(self, device_of: Tensor) -> None:
        for _ in range(self.times):
            for x in self.inputs:
                self.layer(x)


def compare_layers(variants: Mapping[Key, tuple[nn.Module, tuple[Tensor, ...]]], timing: Timing) -> tuple[float, dict[Key, float]]:
    """(nanoseconds of one call on all inputs of the first variant, speed-up of every variant over it): each a layer and its inputs."""
    keys = list(variants)
    first = variants[keys[0]][1][0]
    repeats = IN_A_ROW if first.is_cuda else 1
    timed = compare({str(number): _Run(*variants[key], repeats) for number, key in enumerate(keys)}, first, SHARE * timing.seconds, timing.threads)
    return timed["0"].latency.median_ms * 1e6 / repeats, {key: timed[str(number)].speedup for number, key in enumerate(keys)}


def random_inputs(layer: nn.Module, shapes: tuple[tuple[int, ...], ...], example: Any) -> tuple[Tensor, ...]:
    """Random inputs of these shapes, of the layer's type and device, channels last where the example is."""
    weight, first = next(layer.parameters()), arguments(example)[0]
    last = isinstance(first, Tensor) and first.ndim == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(weight) for shape in shapes]
    return tuple(x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x for x in made)
