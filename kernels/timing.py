"""Times alternatives against each other: interleaved, so that a slow phase of the machine hits all of them, medians with spread.

On a GPU each alternative is a CUDA graph of many launches that go round several copies of its tensors, together more than three times the
second-level cache, so that weights come from memory as they do inside a network. All of it happens on the current device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LAUNCHES = 20
MOST_COPIES = 512
COLD = 3  # times the second-level cache
MIN_ROUNDS = 5
WARM_ROUNDS = 3
# The GPU waits so many clock cycles (about half a millisecond) for every so many calls of a timed graph, which the host launches meanwhile.
HEAD_START = 1_000_000
HEAD_START_CALLS = 512


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


def copies_needed(bytes_each: int, device: torch.device, most: int = MOST_COPIES) -> int:
    """Copies of a tensor of that size that exceed three times the second-level cache, at most `most` and half the free memory."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    bytes_each = max(1, bytes_each)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(most, -(-COLD * cache // bytes_each), free // (2 * bytes_each)))


def temperature(rotated: int, device: torch.device) -> str:
    """Where calls that go round `rotated` bytes find them: "cold" beyond three times the second-level cache, "warm" where all of them fit into
    it, "partly warm" between, where a cache that replaces at random keeps some of them."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return "warm" if rotated <= cache else "cold" if rotated >= COLD * cache else "partly warm"


@dataclass(frozen=True)
class Captured:
    """A graph of `launches` calls, with all that it reads and writes: a graph does not keep the tensors alive that it was captured with."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], object]]
    output: object
    launches: int
    device: int


def capture(calls: Sequence[Callable[[], object]], launches: int = LAUNCHES) -> Captured:
    """A graph that goes round `calls` (the same call on several copies of its tensors), each at least once and `launches` calls or more,
    after one plain call of each. A call that cannot be captured raises and leaves the device as it was."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    side.synchronize()
    launches = max(launches, len(calls))
    try:
        graph, output = _record(side, [calls[number % len(calls)] for number in range(launches)])
    except Exception:
        # A broken capture leaves torch's random generator in the state of one; a capture that succeeds takes it out.
        with contextlib.suppress(Exception):
            scratch = torch.zeros(1, device="cuda")
            _record(torch.cuda.Stream(), [scratch.zero_])
        raise
    return Captured(graph, calls, output, launches, torch.cuda.current_device())


def _record(side: torch.cuda.Stream, calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, object]:
    """(a graph of the calls, what the last one returned); an exception ends the capture, which torch's context manager does not do."""
    graph, pool, current, output = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            for call in calls:
                output = call()
    except Exception:
        torch.cuda.set_stream(current)
        # Raises where the capture ended well enough to close its pool; the graph then releases it.
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise
    return graph, output


def replay(graphs: Sequence[Captured], rounds: int = 30) -> list[Timing]:
    """Interleaved replays; times are per call."""
    samples: list[list[float]] = [[] for _ in graphs]
    for number in range(rounds + WARM_ROUNDS):
        for captured, taken in zip(graphs, samples):
            with torch.cuda.device(captured.device):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START * -(-captured.launches // HEAD_START_CALLS))
                start.record()
                captured.graph.replay()
                stop.record()
                stop.synchronize()
            if number >= WARM_ROUNDS:
                taken.append(start.elapsed_time(stop) / 1e3 / captured.launches)
    return [summarise(taken) for taken in samples]


def on_cuda(calls: Sequence[Sequence[Callable[[], object]]], rounds: int = 30, launches: int = LAUNCHES) -> list[Timing]:
    """Each element of `calls` is one alternative: the same call on several copies of its tensors. Interleaved replays of one graph each."""
    return replay([capture(alternatives, launches) for alternatives in calls], rounds)
