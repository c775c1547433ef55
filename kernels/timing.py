"""Times alternatives against each other: interleaved, so that a slow phase of the machine hits all of them, medians with spread.

On a GPU each alternative is a CUDA graph of many launches that go round several copies of its tensors, together more than three times the
second-level cache, so that weights come from memory as they do inside a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LAUNCHES = 20
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile, and the number of measurements."""

    median: float
    p10: float
    p90: float
    runs: int


def summarise(seconds: Sequence[float]) -> Timing:
    """Timing of single-call durations in seconds."""
    ordered = sorted(1e6 * s for s in seconds)
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.1, 0.9)]
    return Timing(*at, len(ordered))


def on_cpu(calls: Sequence[Callable[[], object]], seconds: float, rounds: int = MIN_ROUNDS, warm: bool = False) -> list[Timing]:
    """Interleaved single calls for about `seconds` in all, at least `rounds` of each, after one that is not counted unless they are `warm`."""
    for call in () if warm else calls:
        call()
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < rounds:
        for call, taken in zip(calls, samples):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [summarise(taken) for taken in samples]


def copies_needed(bytes_each: int, device: torch.device) -> int:
    """Copies of a tensor of that size that exceed three times the second-level cache, at most LAUNCHES."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(LAUNCHES, -(-3 * cache // max(1, bytes_each))))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of LAUNCHES calls that go round `calls` (the same call on several copies of its tensors), after one plain call of each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for number in range(LAUNCHES):
            calls[number % len(calls)]()
    return graph


def replay(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int = 30) -> list[Timing]:
    """Interleaved replays; times are per call."""
    samples: list[list[float]] = [[] for _ in graphs]
    for number in range(rounds + 3):
        for graph, taken in zip(graphs, samples):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if number >= 3:
                taken.append(start.elapsed_time(stop) / 1e3 / LAUNCHES)
    return [summarise(taken) for taken in samples]


def on_cuda(calls: Sequence[Sequence[Callable[[], object]]], rounds: int = 30) -> list[Timing]:
    """Each element of `calls` is one alternative: the same call on several copies of its tensors. Interleaved replays of one graph each."""
    return replay([capture(alternatives) for alternatives in calls], rounds)
