"""Times of single layers on inputs of their real shapes: several variants of a layer in turns, relative to the layer as it is.

There are many variants, so each gets few runs: in each of `TURNS` turns one block of runs that is not shorter than its share of the measuring time, or a
single run. What these times are used for is corrected by measuring whole networks.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.methods.timing import Timing
from compress.undisturbed import arguments, undisturbed

TURNS = 5
SHARE = 0.1  # of a network's measuring time that each variant of a layer gets
LAUNCHES = 10  # runs per CUDA block at least: launches then overlap with the device's work, as they do within a network

Times = dict[tuple, float]
Key = TypeVar("Key", bound=Hashable)


def compare_layers(variants: Mapping[Key, tuple[nn.Module, tuple[Tensor, ...]]], timing: Timing) -> tuple[float, dict[Key, float]]:
    """(nanoseconds of one call on all inputs of the first variant, speed-up of every variant over it): each a layer and its inputs."""
    before = torch.get_num_threads()
    torch.set_num_threads(timing.threads or before)
    try:
        with contextlib.ExitStack() as stack, torch.inference_mode():
            blocks: dict[Key, Callable[[], float]] = {}
            for key, (layer, inputs) in variants.items():
                stack.enter_context(undisturbed(layer))
                blocks[key] = _block(layer, inputs, SHARE * timing.seconds / TURNS)
            turns = [{key: block() for key, block in blocks.items()} for _ in range(TURNS)]
    finally:
        torch.set_num_threads(before)
    first = next(iter(variants))
    return 1e9 * statistics.median(turn[first] for turn in turns), {key: statistics.median(turn[first] / turn[key] for turn in turns) for key in variants}


def _block(layer: nn.Module, inputs: tuple[Tensor, ...], seconds: float) -> Callable[[], float]:
    """A function that returns the seconds of one call on all inputs, averaged over a block of calls; the layer is run to warm up."""
    device = inputs[0].device if inputs[0].is_cuda else None

    def run(times: int) -> float:
        if device:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            for x in inputs:
                layer(x)
        if device:
            torch.cuda.synchronize(device)
        return max(time.perf_counter() - start, 1e-9) / times

    run(1)
    once = run(1)
    return lambda times=max(LAUNCHES if device else 1, math.ceil(seconds / once)): run(times)


def random_inputs(layer: nn.Module, shapes: tuple[tuple[int, ...], ...], example: Any) -> tuple[Tensor, ...]:
    """Random inputs of these shapes, of the layer's type and device, channels last where the example is."""
    weight, first = next(tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point()), arguments(example)[0]
    last = isinstance(first, Tensor) and first.ndim == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(weight) for shape in shapes]
    return tuple(x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x for x in made)
