"""`sparsify`: measures dense and sparse forms of every masked layer on this device and keeps whichever is faster.

For each Linear and Conv2d with zeros in its weight the inputs that the network really gives it are recorded; dense and every candidate are
timed on inputs of these shapes, interleaved, and a sparse form replaces the layer only where it is more than `margin` faster in two
measurements and computes the same. What torch runs instead of single layers (encoder.py) is timed as a whole. At the end the whole network
is timed before and after; if it did not get faster it is returned dense.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from . import candidates, encoder, measure, modules
from .table import Table, default_path, layer_key

FEWEST_ZEROS = 0.05
MOST_SHAPES = 3
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
         "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


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
        lines = [f"{c.layer or '(the network itself)'}: {c.choice}, density {c.density:.2f}, {c.reason}" for c in self.choices]
        measured = not math.isnan(self.before_us)
        times = f"{self.before_us:.0f} us before, {self.after_us:.0f} us after" if measured else "not measured, because no layer was replaced"
        return "\n".join([*lines, f"network: {times}{', ' + self.note if self.note else ''}"])


def sparsify(model: nn.Module, example_inputs: Tensor | tuple, *, margin: float = 0.03, seconds: float = 0.3, table: Path | None = None,
             remeasure: bool = False, log: Callable[[str], None] | None = None) -> tuple[nn.Module, Report]:
    """(a copy of `model` with sparse layers where they are faster, what was chosen and why).

    example_inputs: a tensor or a tuple of positional arguments, on the model's device, of the batch size that matters. margin: fraction
    by which a sparse form must be faster. seconds: time for measuring one layer. table: the JSON file of measurements
    (default: table.default_path()); `remeasure` ignores what it holds, and a measurement in which a form failed is not kept. log: called
    with one line per layer.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    sparse = _copy(model)
    measured = Table(table or default_path())
    report = Report()

    def tell(choice: Choice) -> None:
        if log is not None:
            log(f"{choice.layer or '(the network itself)'}: {choice.choice}, {choice.reason}")

    with _evaluating(model), torch.no_grad():
        shapes, calls = _record(model, inputs)
        shared, replacements = _shared_weights(model), {}
        for name, layer in _layers(model):
            choice, replacement = _decide(name, layer, shapes.get(name, Counter()), shared, margin, seconds, measured, remeasure)
            report.choices.append(choice)
            tell(choice)
            if replacement is not None:
                replacements[name] = replacement
        for name, reason in encoder.slower(model, replacements, calls, margin, seconds).items():
            number = next(i for i, choice in enumerate(report.choices) if choice.layer == name)
            choice = report.choices[number]
            report.choices[number] = replace(choice, choice="dense", reason=f"{choice.reason}, but {reason}")
            tell(report.choices[number])
            replacements.pop(name, None)
        sparse = _put(sparse, replacements)
    if report.replaced and not _faster(model, sparse, inputs, report, seconds):
        report.note = ", ".join(filter(None, ("returned dense, because the whole network did not get faster", report.note)))
        report.choices = [replace(c, choice="dense") for c in report.choices]
        return _copy(model), report
    return sparse, report


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; attributes that a hook computes from parameters (as torch.nn.utils.prune does) are copied without their history, which
    copy.deepcopy refuses to do."""
    computed = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


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
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]


def _put(network: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """The network with other modules in the place of those of these names, in the same mode."""
    names = _names(network)
    for name, replacement in replacements.items():
        replacement.train(network.get_submodule(name).training)
        if not name:
            return replacement
        for path in names[name]:
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, replacement)
    for _, layer in encoder.encoder_layers(network):
        if any(isinstance(own, modules.SparseLinear) for own in encoder.linears(layer).values()):
            encoder.call_layers(layer)
    return network


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


def _hooked(layer: nn.Module) -> bool:
    """Whether something is attached to the layer that would be lost with it; hooks that only recompute a pruned weight are not."""
    hooks = (hook for kind in HOOKS for hook in vars(layer).get(kind, {}).values())
    return "forward" in vars(layer) or any(not isinstance(hook, prune.BasePruningMethod) for hook in hooks)


def _plain(layer: nn.Module) -> nn.Module:
    """The layer; a copy with the masked weight itself where torch.nn.utils.prune recomputes it in every call, which takes time."""
    names = [hook._tensor_name for hook in layer._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
    plain = _copy(layer) if names else layer
    for name in names:
        prune.remove(plain, name)
    return plain


def _record(model: nn.Module, inputs: tuple) -> tuple[dict[str, Counter], dict[str, tuple]]:
    """What one forward pass gives to its layers: shape (rows of all parts of a nested tensor together), data type and memory layout of every
    layer's inputs with their number, and the arguments of the first call of each encoder layer with zeros to skip."""
    seen: dict[str, Counter] = {}
    calls: dict[str, tuple] = {}
    hooks = []
    for name, layer in _layers(model):
        def record(module: nn.Module, args: tuple, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                x = args[0]
                shape = (x.numel() // max(1, x.size(-1)), x.size(-1)) if x.is_nested else tuple(x.shape)
                last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
                seen.setdefault(name, Counter())[(shape, x.dtype, last)] += 1

        hooks.append(layer.register_forward_pre_hook(record))
    for name, layer in encoder.encoder_layers(model):
        def keep(module: nn.Module, args: tuple, keywords: dict, name: str = name) -> None:
            calls.setdefault(name, (args, keywords))

        # Their inputs stay in memory until they are timed.
        if any(type(own) is nn.Linear and _density(own) <= 1 - FEWEST_ZEROS for own in encoder.linears(layer).values()):
            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, calls


def _density(layer: nn.Module) -> float:
    return float((layer.weight != 0).sum()) / max(1, layer.weight.numel())


def _decide(name: str, layer: nn.Module, shapes: Counter, shared: set[int], margin: float, seconds: float, table: Table,
            remeasure: bool) -> tuple[Choice, nn.Module | None]:
    """The choice for one layer and, where it is not dense, the module that takes its place."""
    weight = layer.weight
    density = _density(layer)
    shape = next(iter(shapes))[0] if shapes else ()

    def stay(reason: str, dense: float = math.nan, best: float = math.nan) -> tuple[Choice, None]:
        return Choice(name, type(layer).__name__, shape, density, "dense", dense, best, reason), None

    if density > 1 - FEWEST_ZEROS:
        return stay(f"only {1 - density:.1%} of the weights are zero")
    if not shapes:
        return stay("the example did not run it")
    if id(getattr(layer, "weight_orig", weight)) in shared:
        return stay("its weight is tied to another layer's")
    if _hooked(layer):
        return stay("it has hooks, which a sparse layer would not call")
    layer = _plain(layer)
    reason = modules.unsupported(layer) if isinstance(layer, nn.Conv2d) else None
    if reason:
        return stay(f"it has {reason}")
    if weight.dtype not in measure.TOLERANCE or any(dtype != weight.dtype for _, dtype, _ in shapes):
        return stay(f"no kernel for weights of {weight.dtype} on inputs of {', '.join(sorted({str(d) for _, d, _ in shapes}))}")
    common = shapes.most_common(MOST_SHAPES)
    offered = {c.label: c for c in candidates.eligible(layer, common[0][0][0])}
    if not offered:
        return stay(f"no sparse kernel for {weight.dtype} on {weight.device.type}")

    totals, faults = dict.fromkeys(["dense", *offered], 0.0), {}
    for (size, dtype, last), count in common:
        key = layer_key(layer, size, last, density)
        times = None if remeasure else table.get(key, list(totals))
        if times is None:
            found = measure.layer_times(layer, offered, size, last, seconds)
            if "dense" not in found.times:
                return stay(f"the dense layer could not be measured: {found.faults.get('dense', 'unknown')}")
            times = found.times
            faults |= found.faults
            # What failed may do so for these weights, this memory or this once; a row with a gap would be measured anew anyway.
            if not found.faults:
                table.put(key, {k: times.get(k, math.inf) for k in totals})
        for label in totals:
            totals[label] += count * times.get(label, math.inf)
    best = min(offered, key=lambda label: totals[label])
    dense, fastest = totals["dense"], totals[best]
    unusable = "".join(f"; not usable: {label} ({fault})" for label, fault in faults.items())
    if not fastest * (1 + margin) < dense:
        how = f"{best} took {fastest:.0f} us" if math.isfinite(fastest) else "no sparse form was near it or right"
        return stay(f"dense took {dense:.0f} us and {how}{unusable}", dense, fastest)
    # The times may be older than the kernels that would run now.
    try:
        replacement = offered[best].build()
        wrong = measure.check(layer, replacement, common[0][0][0], common[0][0][2])
    except Exception as failure:
        wrong = measure.first_line(failure)
    if wrong:
        return stay(f"dense took {dense:.0f} us and {best}, though faster, is not usable: {wrong}", dense, fastest)
    reason = f"dense took {dense:.0f} us and {best} {fastest:.0f} us ({dense / fastest:.2f} times as fast){unusable}"
    return Choice(name, type(layer).__name__, shape, density, best, dense, fastest, reason), replacement


def _faster(model: nn.Module, sparse: nn.Module, inputs: tuple, report: Report, seconds: float) -> bool:
    """Whether the whole network was not slower with the sparse layers in either of two measurements."""
    with _evaluating(model), _evaluating(sparse), torch.no_grad():
        for report.before_us, report.after_us, report.note in measure.network_times((model, sparse), inputs, max(seconds, 0.5)):
            if report.after_us > report.before_us:
                return False
    return True
