"""`sparsify`: measures dense and sparse forms of every masked layer on this device and keeps whichever is faster.

For each Linear and Conv2d with zeros in its weight the inputs that the network really gives it are recorded; dense and every candidate are
timed on inputs of these shapes, interleaved, and a sparse form replaces the layer only where it is more than `margin` faster in two
measurements and computes the same. At the end the whole network is timed before and after; if it did not get faster it is returned
dense.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import candidates, modules, timing
from .table import Table, default_path, device_name
from .vector_block.reference import kept_columns

FEWEST_ZEROS = 0.05
HOPELESS = 3.0
SLOW = 0.05  # seconds; noise is a small part of a call that takes longer, and a few of them tell
SCREENED = 16  # a slow layer's candidates are first tried on so small a part of the batch
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
MOST_SHAPES = 3


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer: "dense" or a candidate's label, microseconds per forward pass of the network (NaN where not measured),
    and why."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    density: float
    choice: str
    dense_us: float
    best_us: float
    reason: str

    @property
    def speedup(self) -> float:
        """Dense time over the chosen form's time."""
        return self.dense_us / self.best_us if self.choice != "dense" else 1.0


@dataclass
class Report:
    """One Choice per Linear and Conv2d, and the whole network's microseconds before and after."""

    choices: list[Choice] = field(default_factory=list)
    before_us: float = math.nan
    after_us: float = math.nan
    note: str = ""

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [c.layer for c in self.choices if c.choice != "dense"]

    def __str__(self) -> str:
        lines = [f"{c.layer}: {c.choice}, density {c.density:.2f}, {c.reason}" for c in self.choices]
        lines.append(f"network: {self.before_us:.0f} us before, {self.after_us:.0f} us after{', ' + self.note if self.note else ''}")
        return "\n".join(lines)


def sparsify(model: nn.Module, example_inputs: Tensor | tuple, *, margin: float = 0.03, seconds: float = 0.3, table: Path | None = None,
             remeasure: bool = False, log: Callable[[str], None] | None = None) -> tuple[nn.Module, Report]:
    """(a copy of `model` with sparse layers where they are faster, what was chosen and why).

    example_inputs: a tensor or a tuple of positional arguments, on the model's device, of the batch size that matters. margin: fraction
    by which a sparse form must be faster. seconds: time for measuring one layer. table: the JSON file of measurements
    (default: table.default_path()); `remeasure` ignores what it holds. log: called with one line per layer.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    sparse = copy.deepcopy(model)
    measured = Table(table or default_path())
    report = Report()
    with _evaluating(model), torch.no_grad():
        shapes = _input_shapes(model, inputs)
        names = _names(sparse)
        shared = _shared_weights(model)
        for name, layer in _layers(model):
            choice, replacement = _decide(name, layer, shapes.get(name, Counter()), shared, margin, seconds, measured, remeasure)
            report.choices.append(choice)
            if log is not None:
                log(f"{choice.layer}: {choice.choice}, {choice.reason}")
            if replacement is not None:
                replacement.train(sparse.get_submodule(name).training)
                for path in names[name]:
                    parent, _, attribute = path.rpartition(".")
                    setattr(sparse.get_submodule(parent), attribute, replacement)
    if report.replaced and not _faster(model, sparse, inputs, report, seconds):
        report.note = "returned dense, because the whole network did not get faster"
        report.choices = [replace(c, choice="dense") for c in report.choices]
        return copy.deepcopy(model), report
    return sparse, report


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers whose `forward` is the plain one; subclasses may be read by other modules without being called."""
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d) and name]


def _names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each module, by its first one."""
    first = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(first[id(module)], []).append(name)
    return found


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that more than one module holds."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {identity for identity, count in holders.items() if count > 1}


def _input_shapes(model: nn.Module, inputs: tuple) -> dict[str, Counter]:
    """Shapes (and memory layout) of every layer's inputs in one forward pass, with their number."""
    seen: dict[str, Counter] = {}
    hooks = []
    for name, layer in _layers(model):
        def record(module: nn.Module, args: tuple, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                last = args[0].ndim == 4 and not args[0].is_contiguous() and args[0].is_contiguous(memory_format=torch.channels_last)
                seen.setdefault(name, Counter())[(tuple(args[0].shape), args[0].dtype, last)] += 1

        hooks.append(layer.register_forward_pre_hook(record))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _decide(name: str, layer: nn.Module, shapes: Counter, shared: set[int], margin: float, seconds: float, table: Table,
            remeasure: bool) -> tuple[Choice, nn.Module | None]:
    """The choice for one layer and, where it is not dense, the module that takes its place."""
    weight = layer.weight
    density = float((weight != 0).sum()) / max(1, weight.numel())
    shape = next(iter(shapes))[0] if shapes else ()

    def stay(reason: str, dense: float = math.nan, best: float = math.nan) -> tuple[Choice, None]:
        return Choice(name, type(layer).__name__, shape, density, "dense", dense, best, reason), None

    if density > 1 - FEWEST_ZEROS:
        return stay(f"only {1 - density:.1%} of the weights are zero")
    if not shapes:
        return stay("the example did not run it")
    if id(weight) in shared:
        return stay("its weight is tied to another layer's")
    reason = modules.unsupported(layer) if isinstance(layer, nn.Conv2d) else None
    if reason:
        return stay(f"it has {reason}")
    if weight.dtype not in TOLERANCE or any(dtype != weight.dtype for _, dtype, _ in shapes):
        return stay(f"no kernel for weights of {weight.dtype} on inputs of {', '.join(sorted({str(d) for _, d, _ in shapes}))}")
    common = shapes.most_common(MOST_SHAPES)
    offered = {c.label: c for c in candidates.eligible(layer, common[0][0][0])}
    if not offered:
        return stay(f"no sparse kernel for {weight.dtype} on {weight.device.type}")

    totals = dict.fromkeys(["dense", *offered], 0.0)
    for (size, dtype, last), count in common:
        key = _key(layer, size, last, density)
        times = None if remeasure else table.get(key, list(totals))
        if times is None:
            times = _measure(layer, offered, size, last, seconds)
            table.put(key, {k: times.get(k, math.inf) for k in totals})
        for label in totals:
            totals[label] += count * times.get(label, math.inf)
    best = min(offered, key=lambda label: totals[label])
    dense, fastest = totals["dense"], totals[best]
    if not fastest * (1 + margin) < dense:
        how = f"{best} took {fastest:.0f} us" if math.isfinite(fastest) else "no sparse form was near it or right"
        return stay(f"dense took {dense:.0f} us and {how}", dense, fastest)
    replacement = offered[best].build()
    reason = f"dense took {dense:.0f} us and {best} {fastest:.0f} us ({dense / fastest:.2f} times as fast)"
    return Choice(name, type(layer).__name__, shape, density, best, dense, fastest, reason), replacement


def _key(layer: nn.Module, shape: tuple[int, ...], channels_last: bool, density: float) -> str:
    weight = layer.weight
    geometry = f"linear {tuple(weight.shape)}"
    if isinstance(layer, nn.Conv2d):
        geometry = f"conv {tuple(weight.shape)} {layer.stride} {layer.padding} {layer.dilation}"
    pattern = kept_columns((weight != 0).flatten(1), 64)
    layout = " channels_last" if channels_last else ""
    on = f"{device_name(weight.device)} | {geometry} on {shape}{layout}"
    return f"{on} | {weight.dtype} | density {density:.2f} | 64-row vectors {pattern:.1f}"


def _measure(layer: nn.Module, offered: dict[str, candidates.Candidate], shape: tuple[int, ...], channels_last: bool,
             seconds: float) -> dict[str, float]:
    """Microseconds of "dense" and of each candidate that computes the same and is not hopeless."""
    weight = layer.weight
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(shape, device=weight.device, dtype=torch.float32, generator=generator).to(weight.dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected, dense = _timed(lambda: layer(x))
    slow = not weight.is_cuda and dense > SLOW
    if not slow:
        dense = min(dense, _timed(lambda: layer(x))[1])
    built = {"dense": layer}
    for label, candidate in offered.items():
        try:
            module = candidate.build()
            if slow and len(x) >= 2 * SCREENED and _hopeless(module, layer, x[: len(x) // SCREENED]):
                continue
            y, taken = _timed(lambda: module(x))
            distance = float((y - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
            if not (slow or weight.is_cuda):
                taken = min(taken, *(_timed(lambda: module(x))[1] for _ in range(2)))
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            continue
        if distance <= TOLERANCE[weight.dtype] and (weight.is_cuda or taken < HOPELESS * dense):
            built[label] = module
    if weight.is_cuda:
        return _time_cuda(built, x)
    rounds = _rounds(dense, seconds)
    halves = [_time_cpu(built, x, seconds / 2, rounds) for _ in range(2)]
    return {label: (min if label == "dense" else max)(half[label] for half in halves) for label in built}


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


def _time_cpu(built: dict[str, nn.Module], x: Tensor, seconds: float, rounds: int) -> dict[str, float]:
    taken = timing.on_cpu([lambda module=module: module(x) for module in built.values()], seconds, rounds, warm=True)
    return {label: t.median for label, t in zip(built, taken)}


def _time_cuda(built: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    graphs = {}
    for label, module in built.items():
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        copies = [module, *(copy.deepcopy(module) for _ in range(timing.copies_needed(size, x.device) - 1))]
        try:
            graphs[label] = timing.capture([lambda copied=copied: copied(x) for copied in copies])
        except RuntimeError:
            if label == "dense":
                raise
    halves = [timing.replay(list(graphs.values())) for _ in range(2)]
    return {label: (min if label == "dense" else max)(half[i].median for half in halves) for i, label in enumerate(graphs)}


def _faster(model: nn.Module, sparse: nn.Module, inputs: tuple, report: Report, seconds: float) -> bool:
    """Whether the whole network was not slower with the sparse layers in either of two measurements."""
    def run(network: nn.Module) -> None:
        network(*inputs)
        if cuda:
            torch.cuda.synchronize()

    cuda = any(p.is_cuda for p in model.parameters())
    with _evaluating(model), _evaluating(sparse), torch.no_grad():
        rounds = _rounds(max(_timed(lambda network=network: run(network))[1] for network in (model, sparse)), max(seconds, 0.5))
        for _ in range(2):
            before, after = timing.on_cpu([lambda: run(model), lambda: run(sparse)], max(seconds, 0.5), rounds, warm=True)
            report.before_us, report.after_us = before.median, after.median
            if after.median > before.median:
                return False
    return True
