"""Times a dense layer against its sparse forms on inputs of one shape, and a whole network before and after; checks that they compute the same.

The reference is the layer itself; for float32 on a GPU, whose products may be rounded to TF32, it is the layer in float64.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import precision, timing
from .candidates import Candidate

HOPELESS = 3.0
SLOW = 0.05  # seconds; noise is a small part of a call that takes longer, and a few of them tell
SCREENED = 16  # a slow layer's candidates are first tried on so small a part of the batch
PIECE = 16  # images (or rows) of which the float64 reference and the error are computed at once
NETWORK_LAUNCHES = 3
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TF32_TOLERANCE = 2e-3


@dataclass
class Measured:
    """times: microseconds of "dense" and of the candidates that compute the same and are not hopeless; faults: why others cannot be used."""

    times: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def tolerance(weight: Tensor) -> float:
    """Relative error up to which a form of a layer with this weight counts as right."""
    if weight.dtype == torch.float32 and weight.is_cuda and precision.products_in_tf32():
        return TF32_TOLERANCE
    return TOLERANCE[weight.dtype]


def layer_times(layer: nn.Module, offered: dict[str, Candidate], shape: tuple[int, ...], channels_last: bool, seconds: float) -> Measured:
    """Measures the layer and its candidates on random inputs of that shape."""
    weight, measured = layer.weight, Measured()
    with torch.cuda.device_of(weight):
        x = _example(weight, shape, channels_last)
        expected, dense = _timed(lambda: layer(x))
        slow = not weight.is_cuda and dense > SLOW
        if not slow:
            dense = min(dense, _timed(lambda: layer(x))[1])
        expected = _reference(layer, x, expected)
        built: dict[str, nn.Module] = {"dense": layer}
        for label, candidate in offered.items():
            try:
                module = candidate.build()
                if slow and len(x) >= 2 * SCREENED and _hopeless(module, layer, x[: len(x) // SCREENED]):
                    continue
                y, taken = _timed(lambda: module(x))
                fault = _fault(y, expected, tolerance(weight))
                del y
                if not (slow or weight.is_cuda or fault):
                    taken = min(taken, *(_timed(lambda: module(x))[1] for _ in range(2)))
            except Exception as failure:
                # Triton's compiler has exceptions of its own; whatever a form raises, the layer can do without it.
                fault = first_line(failure)
            if fault:
                measured.faults[label] = fault
            elif weight.is_cuda or taken < HOPELESS * dense:
                built[label] = module
        del expected
        if weight.is_cuda:
            _time_cuda(built, x, measured)
        else:
            rounds = _rounds(dense, seconds)
            _keep(measured, [_time_cpu(built, x, seconds / 2, rounds) for _ in range(2)])
    return measured


def check(layer: nn.Module, module: nn.Module, shape: tuple[int, ...], channels_last: bool) -> str | None:
    """Why `module` may not take the place of `layer`, from one call on a random input of that shape; None if it may."""
    with torch.cuda.device_of(layer.weight):
        x = _example(layer.weight, shape, channels_last)
        try:
            return _fault(module(x), _reference(layer, x, layer(x)), tolerance(layer.weight))
        except Exception as failure:
            return first_line(failure)


def differs(y: Tensor, expected: Tensor) -> str | None:
    """Why y does not count as what a layer with weights of the data type of `expected` returned; None if it does."""
    return _fault(y, expected, tolerance(expected))


def network_times(networks: tuple[nn.Module, nn.Module], inputs: tuple, seconds: float,
                  keywords: dict | None = None) -> Iterator[tuple[float, float, str]]:
    """Two measurements, one after another, of microseconds of both networks on these arguments, and how they were measured ("" on a CPU)."""
    where = next((p for network in networks for p in network.parameters() if p.is_cuda), torch.empty(0))
    calls = [lambda network=network: network(*inputs, **(keywords or {})) for network in networks]
    with torch.cuda.device_of(where):
        graphs, mode = [], ""
        if where.is_cuda:
            try:
                graphs, mode = [timing.capture([call], NETWORK_LAUNCHES) for call in calls], "measured as CUDA graphs"
            except Exception as failure:
                graphs, mode = [], f"measured eagerly, because it cannot be captured in a CUDA graph ({first_line(failure)})"
                calls = [lambda call=call: (call(), torch.cuda.synchronize()) for call in calls]
        rounds = 0 if graphs else _rounds(max(_timed(call)[1] for call in calls), seconds)
        for _ in range(2):
            before, after = timing.replay(graphs) if graphs else timing.on_cpu(calls, seconds, rounds, warm=True)
            yield before.median, after.median, mode


def first_line(failure: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)


def _example(weight: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(shape, device=weight.device, dtype=torch.float32, generator=generator).to(weight.dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _reference(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What `layer` should return for x, given what it returned."""
    if not (x.is_cuda and x.dtype == torch.float32):
        return y
    exact = copy.deepcopy(layer).double()
    batched = x.ndim == 4 if isinstance(layer, nn.Conv2d) else x.ndim > 1
    return torch.cat([exact(part.double()).float() for part in x.split(PIECE)]) if batched else exact(x.double()).float()


def _fault(y: Tensor, expected: Tensor, most: float) -> str | None:
    """What is wrong with y; squares are summed in pieces, so that no further tensor of its size is needed."""
    if y.shape != expected.shape or y.dtype != expected.dtype:
        return f"it returned {y.dtype} {list(y.shape)} instead of {expected.dtype} {list(expected.shape)}"

    def squares(parts: Iterable[Tensor]) -> float:
        return float(sum(part.float().square().sum(dtype=torch.float64) for part in parts))

    pairs = zip(y.split(PIECE), expected.split(PIECE))
    distance = math.sqrt(squares(a - b for a, b in pairs) / max(squares(expected.split(PIECE)), 1e-60))
    return None if distance <= most else f"it differs from the dense layer by {distance:.1e}"


def _timed(call: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _hopeless(module: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    """Whether the module is far slower than the layer on a part of the batch."""
    times = [min(_timed(lambda network=network: network(x))[1] for _ in range(2)) for network in (module, layer)]
    return times[0] > HOPELESS * times[1]


def _rounds(call: float, seconds: float) -> int:
    """Rounds of a measurement of calls that take `call` seconds: fewer of slow ones where the usual number would take far more than `seconds`."""
    return timing.MIN_ROUNDS if call <= max(SLOW, seconds) else 2


def _keep(measured: Measured, halves: list[dict[str, float]]) -> None:
    """The time of each alternative that speaks against a sparse form: the shorter one of dense, the longer one of the others."""
    measured.times = {label: (min if label == "dense" else max)(half[label] for half in halves) for label in halves[0]}


def _time_cpu(built: dict[str, nn.Module], x: Tensor, seconds: float, rounds: int) -> dict[str, float]:
    taken = timing.on_cpu([lambda module=module: module(x) for module in built.values()], seconds, rounds, warm=True)
    return {label: t.median for label, t in zip(built, taken)}


def _time_cuda(built: dict[str, nn.Module], x: Tensor, measured: Measured) -> None:
    graphs: dict[str, timing.Captured] = {}
    for label, module in built.items():
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        try:
            copies = [module, *(copy.deepcopy(module) for _ in range(timing.copies_needed(size, x.device) - 1))]
            graphs[label] = timing.capture([lambda copied=copied: copied(x) for copied in copies])
        except Exception as failure:
            measured.faults[label] = first_line(failure)
    if "dense" in graphs:
        _keep(measured, [{label: t.median for label, t in zip(graphs, timing.replay(list(graphs.values())))} for _ in range(2)])
