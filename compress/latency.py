"""How long a network takes and how much memory it needs at its peak.

Latency is the time of one forward pass of the whole batch in evaluation and inference mode: median, 10th and 90th percentile.

CPU    torch.utils.benchmark.Timer. Each value is the mean over one block of runs; fast networks get blocks of many runs, so that the
       clock's own cost does not count.
CUDA   "eager": from the call to the end of the device's work, launches included, one synchronisation per run (what a caller
       waits for); "graph": replay of a captured CUDA graph between two events (what the device needs without launches).

Peak memory counts the same things on both devices: parameters, buffers, inputs, and the most bytes of results alive at one time. CUDA:
the allocator's peak (workspaces included). CPU: live storages are followed through every ATen operator, because resident memory depends
on the allocator and the pages of whatever ran before, and is not repeatable; workspaces inside an operator are not seen.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.errors import RunError, UserError
from compress.undisturbed import arguments, undisturbed

MIN_VALUES = 5
TURNS = 10
_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds per forward pass of the whole batch; `runs` is the number of values behind the percentiles."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """One network's latency beside the first one's, measured in turns; speedup = time of the first / time of this one."""

    latency: Latency
    speedup: float
    speedup_p10: float
    speedup_p90: float


def latency(model: nn.Module, example_inputs: Any, seconds: float = 0.3, threads: int | None = None, mode: str = "eager") -> Latency:
    """Latency of `model` on the device of its inputs.

    Parameters
    ----------
    example_inputs: a tensor [B, ...] or a tuple of positional arguments, on the model's device.
    seconds: shortest measuring time after warming up.
    threads: CPU threads while measuring, as torch is set where None; restored afterwards.
    mode: "eager" (CUDA: launches included) or "graph" (CUDA graph replay).

    Raises
    ------
    UserError: an unknown mode, or "graph" on a CPU. RunError: a network that cannot be captured in a CUDA graph.
    """
    with prepared(model, example_inputs, threads, mode) as measure:
        values = measure(seconds)
        while len(values) < MIN_VALUES:
            values += measure(0.0)
    return _summary(values)


def latencies(model: nn.Module, example_inputs: Any, seconds: float = 0.3, threads: int | None = None) -> dict[str, Latency]:
    """`latency` in every mode that there is: "eager", and on CUDA "graph" unless the network cannot be captured."""
    result = {"eager": latency(model, example_inputs, seconds, threads)}
    if _cuda_device(arguments(example_inputs)) is not None:
        with contextlib.suppress(RunError):
            result["graph"] = latency(model, example_inputs, seconds, threads, "graph")
    return result


def compare(models: dict[str, nn.Module], example_inputs: Any, seconds: float = 0.3, threads: int | None = None,
            mode: str = "eager") -> dict[str, Comparison]:
    """Time several networks in turns, so that a machine that slows down slows all of them.

    Each network gets ten turns of a tenth of `seconds`. A speedup is formed within a turn from the medians of both networks, and its
    median and percentiles are over turns; a latency is over all values. The first network is the reference.
    """
    if not models:
        return {}
    with contextlib.ExitStack() as stack:
        measures = {name: stack.enter_context(prepared(model, example_inputs, threads, mode)) for name, model in models.items()}
        turns = [{name: measure(seconds / TURNS) for name, measure in measures.items()} for _ in range(TURNS)]
    first = next(iter(models))
    result = {}
    for name in models:
        ratios = [statistics.median(turn[first]) / statistics.median(turn[name]) for turn in turns]
        values = [value for turn in turns for value in turn[name]]
        result[name] = Comparison(_summary(values), statistics.median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9))
    return result


@contextlib.contextmanager
def prepared(model: nn.Module, example_inputs: Any, threads: int | None, mode: str) -> Iterator[Callable[[float], list[float]]]:
    """A function that measures for so many seconds (at least once) and returns the values, in seconds per run."""
    inputs = arguments(example_inputs)
    device = _cuda_device(inputs)
    if mode not in ("eager", "graph") or (mode == "graph" and device is None):
        raise UserError(f"Latency is measured in mode 'eager', or 'graph' on a CUDA device, and mode {mode!r} was asked for "
                        f"on {'CUDA' if device else 'a CPU'}.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with undisturbed(model), torch.inference_mode(), torch.cuda.device(device) if device else contextlib.nullcontext():
            for _ in range(_WARM_UP):
                model(*inputs)
            if device is None:
                yield _cpu(model, inputs, threads or before)
            elif mode == "eager":
                yield _cuda_eager(model, inputs)
            else:
                yield _cuda_graph(model, inputs)
    finally:
        torch.set_num_threads(before)


def _timer_class() -> Any:
    """torch.utils.benchmark.Timer; its import warns about a missing CUDA runtime, which nobody asked for here."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    disabled, logger.disabled = logger.disabled, True
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.disabled = disabled
    return Timer


def _cpu(model: nn.Module, inputs: tuple, threads: int) -> Callable[[float], list[float]]:
    timer = _timer_class()("model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=threads)
    return lambda seconds: list(timer.blocked_autorange(min_run_time=seconds).times)


def _cuda_eager(model: nn.Module, inputs: tuple) -> Callable[[float], list[float]]:
    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(*inputs)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda seconds: _repeat(once, seconds)


def _cuda_graph(model: nn.Module, inputs: tuple) -> Callable[[float], list[float]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            model(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = model(*inputs)
    except RuntimeError as error:
        raise RunError(f"The network cannot be captured in a CUDA graph: {str(error).splitlines()[0]}.") from error
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    # `output` keeps the captured memory alive for as long as the graph is replayed.
    def once(held: Any = output) -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    once()
    return lambda seconds: _repeat(once, seconds)


def _repeat(once: Callable[[], float], seconds: float) -> list[float]:
    end = time.perf_counter() + seconds
    values = [once()]
    while time.perf_counter() < end:
        values.append(once())
    return values


def _summary(values: list[float]) -> Latency:
    return Latency(1e3 * statistics.median(values), 1e3 * quantile(values, 0.1), 1e3 * quantile(values, 0.9), len(values))


def quantile(values: list[float], q: float) -> float:
    """Linearly interpolated quantile, q in [0, 1]."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of parameters, buffers and inputs, plus the most bytes of results alive at one time during a forward pass of the batch."""
    inputs = arguments(example_inputs)
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)] + [*model.parameters(), *model.buffers()]
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in given)}
    fixed = sum(storages.values())
    with undisturbed(model), torch.inference_mode():
        if (device := _cuda_device(inputs)) is not None:
            return fixed + _cuda_peak(model, inputs, device)
        tracker = _LiveBytes(set(storages))
        with tracker:
            model(*inputs)
        return fixed + tracker.peak


def _cuda_peak(model: nn.Module, inputs: tuple, device: torch.device) -> int:
    model(*inputs)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(*inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveBytes(TorchDispatchMode):
    """Peak bytes of storages made inside, `known` ones excepted; looked at after every operator."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._known = known
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _cuda_device(inputs: tuple) -> torch.device | None:
    return next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda), None)
