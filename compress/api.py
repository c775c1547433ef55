"""Compression of a network in one call, for use from Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import arguments
from compress.cost import Cost, count
from compress.errors import UserError
from compress.graph import CoverageRow, trace
from compress.methods import Context, carry_out, check_allocation, check_rounding, method as find_method, needs_data
from compress.plan import Plan
from compress.steps.factorize import BLOCKS
from compress.reconstruct import reconstruct as fit
from compress.train import recalibrate as recalibrate_batchnorm

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Report:
    """What a compression did. Fractions are of the original network; `widths` maps a layer to its output width before and after.

    `pinned` names what the method may not touch (parameters; layers for factorizations) with the reason, `coverage` is of channel methods,
    `verified` says what the check after surgery found; `density` is of masks, `latency` ("asked", "saved": fractions of the original's time) of budgets of latency.
    """

    method: str
    budget: dict[str, float]
    before: Cost
    after: Cost
    widths: dict[str, tuple[int, int]]
    pinned: dict[str, str]
    ranks: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    coverage: list[CoverageRow] = field(default_factory=list)
    verified: dict[str, Any] | None = None
    density: float | None = None
    latency: dict[str, Any] | None = None

    @property
    def params_removed(self) -> float:
        """Fraction of the parameters removed."""
        return 1 - self.after.params / self.before.params

    @property
    def macs_removed(self) -> float:
        """Fraction of the multiply-accumulates removed."""
        return 1 - self.after.macs / self.before.macs

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.params_removed:.1%} of the parameters and {self.macs_removed:.1%} of the MACs removed",
            f"  parameters {self.before.params:,} -> {self.after.params:,}",
            f"  MACs       {self.before.macs:,} -> {self.after.macs:,} per input",
        ]
        changed = [f"{name} {before}->{after}" for name, (before, after) in self.widths.items() if before != after]
        if changed:
            lines.append(f"  widths     {', '.join(changed)}")
        if self.density is not None:
            lines.append(f"  masks      {1 - self.density:.1%} of the weights in scope are zero; the shapes stay")
        if self.latency:
            lines.append(f"  latency    {self.latency['saved']:.1%} saved at batch {self.latency['batch_size']}, measured in turns with the original ({self.latency['asked']:.1%} asked)")
        if self.verified:
            lines.append("  verified   " + "; ".join(f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}" for key, value in self.verified.items()))
        if self.ranks:
            lines.append("  ranks      " + ", ".join(f"{name} {'x'.join(map(str, full))}->{'x'.join(map(str, kept))}" for name, (full, kept) in self.ranks.items()))
        lines += [f"  kept {name}: {reason}" for name, reason in self.pinned.items()]
        return "\n".join(lines)


def widths(model: nn.Module) -> dict[str, int]:
    """Output width of every layer with a weight matrix or kernel, by module name."""
    result = {}
    for name, module in model.named_modules():
        width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
        if isinstance(getattr(module, "weight", None), Tensor) and isinstance(width, int):
            result[name] = width
    return result


def ranks(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """Of every factorized layer its (output, input) width and its (output, input) rank."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BLOCKS):
            sizes = (module.out_channels, module.in_channels) if hasattr(module, "out_channels") else (module.out_features, module.in_features)
            found[name] = list(sizes), list(module.factors().ranks)
    return found


def _batches(calibration: Batches, device: torch.device, name: str = "calibration") -> list[tuple[Tensor, Tensor]]:
    """The data of the argument `name` on `device`; UserError where it is no sequence of pairs of tensors."""
    wanted = f"{name} must be batches [(x, y), ...] of two tensors of the same length"
    if not isinstance(calibration, Iterable):
        raise UserError(f"{wanted}, got a {type(calibration).__name__}.")
    batches = []
    for number, batch in enumerate(calibration):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch) or len(batch[0]) != len(batch[1]):
            raise UserError(f"{wanted}; batch {number} is none.")
        if len(batch[0]):
            # Autograd refuses tensors that were made in inference mode; a copy is an ordinary one.
            batches.append(tuple((part.clone() if part.is_inference() else part).to(device) for part in batch))
    return batches


@torch.inference_mode(False)  # a caller's inference mode would make every tensor of the result unusable for training
def compress(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    calibration: Batches | None = None,
    method: str = "l1",
    budget: dict[str, float] | None = None,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    exclude: Iterable[str] = (),
    allocation: str = "global",
    max_layer_ratio: float = 0.95,
    round_to: int = 1,
    recalibrate: bool | Batches = True,
    reconstruct: bool = False,
    verify: bool = True,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> tuple[nn.Module, Plan, Report]:
    """Compress a copy of `model` to `budget`.

    Parameters
    ----------
    model:
        A trained network; it is not changed.
    example_inputs:
        A tensor, or a tuple of positional arguments, of the shape that the network is used with; MACs are counted for one input.
    calibration:
        Training batches `(x, y)` for methods that need data and for the recalibration of BatchNorm. Never test data.
    method:
        A name in `compress.methods.names()`.
    budget:
        One of {"params": ratio}, {"macs": ratio} and {"latency": ratio}: the fraction to REMOVE, in [0, 1). Default: half of the MACs. Latency is
        the measured time of one forward pass on `example_inputs`, whose batch and device then matter; channel methods, `svd`, `tucker`, `cp` and `kfac_*` take it.
    loss_fn:
        `loss_fn(outputs, y)`, mean over the batch, for methods that use gradients.
    exclude:
        Name patterns (fnmatch) of layers that stay as they are.
    allocation, max_layer_ratio, round_to:
        How the budget is shared over the layers, for channels see `compress.allocate`. `max_layer_ratio` is of channel methods; ranks of the
        low-rank methods are multiples of `round_to`, which the EigenDamage kinds and masks refuse.
    recalibrate:
        Measure the BatchNorm statistics again: true on the calibration data (no effect without data or without BatchNorm), or on these
        batches `(x, y)`. A network that was trained on augmented images should get images augmented alike here: statistics of others cost
        published CIFAR-10 ResNets up to three points by themselves. Calibration data are better without augmentation.
    reconstruct:
        Fit each layer of the result to the original's outputs on the calibration data, before BatchNorm is recalibrated
        (`compress.reconstruct`): closed form, one pass per layer, and most of the accuracy that compression alone costs. Not for masks.
    verify:
        Check that the result computes what the original computes with the removed channels zeroed at their consumers.
    options:
        Options of the method itself.

    Returns
    -------
    The compressed network (same mode and device as `model`), the plan, and a report.

    Raises
    ------
    UserError
        For an unknown method or option, a budget that cannot be reached, or missing calibration data.
    """
    budget = {"macs": 0.5} if budget is None else budget
    arguments.check(model, example_inputs, method, options, loss_fn, seed, max_layer_ratio, round_to)
    exclude = arguments.patterns(exclude)
    chosen = find_method(method)
    chosen.check(options or {})
    if hasattr(chosen, "rounds") and (chosen.rounds(options or {}) or 1) > 1:
        raise UserError(f"Option 'rounds' of method {method!r}: compress() does one round; several, with fine-tuning between them, are those of a run (main_prune.py).")
    if not isinstance(budget, dict) or len(budget) != 1 or next(iter(budget)) not in chosen.budgets:
        raise UserError(f"budget={budget!r}: method {method!r} takes one of {', '.join(chosen.budgets)}, such as {{{chosen.budgets[0]!r}: 0.5}}.")
    (quantity, ratio), = budget.items()
    if not arguments.is_number(ratio, float) or not 0 <= ratio < 1:
        raise UserError(f"budget={budget!r}: the ratio is the fraction removed, in [0, 1).")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = _batches(calibration, device) if calibration is not None else []
    refresh = (batches if recalibrate else []) if isinstance(recalibrate, bool) else _batches(recalibrate, device, "recalibrate")
    check_allocation(method, allocation)
    check_rounding(method, round_to)
    if reconstruct and chosen.budgets == ("weights",):
        raise UserError(f"Method {method!r} makes masks, whose zeros reconstruction would not keep; leave reconstruct off.")
    if reconstruct and not batches:
        raise UserError("Reconstruction needs calibration data: pass calibration=[(x, y), ...] from the training set.")
    if needs_data(method, allocation) and not batches:
        what = f"Method {method!r}" if chosen.needs_data else "Allocation 'measured'"
        raise UserError(f"{what} needs calibration data: pass calibration=[(x, y), ...] from the training set.")
    try:
        result = copy.deepcopy(model)
    except Exception as error:
        raise UserError(f"The network cannot be copied ({type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}).") from error
    graph = trace(model, example_inputs, exclude=exclude)
    context = Context(
        model=model, graph=graph, example=example_inputs, batches=batches, loss_fn=loss_fn, generator=torch.Generator().manual_seed(seed), exclude=exclude,
        allocation=allocation, max_layer_ratio=max_layer_ratio, round_to=round_to, verify=verify, options=options or {})
    plan = carry_out(method, result, context, chosen.prepare(context), {quantity: float(ratio)})
    if reconstruct:
        fit(result, copy.deepcopy(model), plan, batches, example_inputs, exclude=exclude)
    if refresh:
        recalibrate_batchnorm(result, refresh)
    old, new = widths(model), widths(result)
    report = Report(
        method=method, budget=budget, before=count(model, example_inputs), after=count(result, example_inputs),
        widths={name: (old[name], new.get(name, old[name])) for name in old}, pinned=dict(graph.pinned) if chosen.by_channels else plan.meta.get("skipped", {}), ranks=ranks(result),
        coverage=list(graph.coverage()) if chosen.by_channels else [], verified=plan.meta.get("verified"), density=plan.meta.get("mask", {}).get("density"),
        latency=plan.meta.get("latency"))
    return result, plan, report
