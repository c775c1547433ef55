"""The proof that surgery changed nothing but what it removed.

The cut network must compute what the original computes with the removed channels set to zero where they are read: in every slice of
role "in" (zeroing the producer in front of a BatchNorm would be something else). Both are run on standard normal inputs of the
example's shape. In float64 the largest difference over the largest output must be <= 1e-10; networks above `FLOAT64_MACS` are
compared in float32 first (<= 1e-5), and in float64 where that is not met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.graph.copies import float_leaves, quiet, random_like
from compress.surgery import named_tensors

FLOAT64_MACS = 5e8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Slices = Mapping[str, Mapping[int, list[int]]]


@dataclass(frozen=True)
class Verdict:
    """`error`: largest difference over the largest absolute output of the masked original; `problem` is empty where they are equal."""

    error: float
    dtype: torch.dtype | None
    problem: str = ""

    def __bool__(self) -> bool:
        return not self.problem


class LastOperator(TorchDispatchMode):
    """Remembers the operator that was called last and its running number, to name it when it fails."""

    name, calls = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += 1
        self.name = f"aten.{func._schema.name.split('::')[1]}"
        return func(*args, **(kwargs or {}))


def mask(model: nn.Module, slices: Slices) -> None:
    """Zeroes the given indices of the given dimensions in place."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, dims in slices.items():
            for dim, indices in dims.items():
                tensors[name].index_fill_(dim, torch.tensor(indices, device=tensors[name].device), 0)


def run(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    """The floating-point outputs."""
    with quiet():
        return float_leaves(model(*inputs))


def compare(masked: nn.Module, cut: nn.Module, inputs: tuple, macs: int, seed: int = 0) -> Verdict:
    """Runs both copies (they may be converted to float64) and compares them."""
    verdict, device = Verdict(0.0, None), next((tensor.device for tensor in masked.parameters()), None)
    for dtype in (torch.float64,) if macs <= FLOAT64_MACS else (torch.float32, torch.float64):
        drawn = random_like(inputs, seed, dtype, device)
        try:
            expected = run(masked.to(dtype), drawn)
        except Exception as error:
            if dtype == torch.float64 and macs <= FLOAT64_MACS:
                return _fallback(masked, cut, random_like(inputs, seed, torch.float32, device))
            return verdict if verdict.dtype is not None else Verdict(float("inf"), dtype, f"the original itself fails: {one_line(error)}")
        try:
            got = run(cut.to(dtype), drawn)
        except Exception as error:
            return Verdict(float("inf"), dtype, f"the cut network fails in {_culprit(cut, drawn)}: {one_line(error)}")
        verdict = _judge(expected, got, dtype)
        if verdict:
            return verdict
    return verdict


def _fallback(masked: nn.Module, cut: nn.Module, drawn: tuple) -> Verdict:
    """For networks that cannot run in float64."""
    try:
        expected = run(masked.to(torch.float32), drawn)
    except Exception as error:
        return Verdict(float("inf"), torch.float32, f"the original itself fails: {one_line(error)}")
    try:
        return _judge(expected, run(cut.to(torch.float32), drawn), torch.float32)
    except Exception as error:
        return Verdict(float("inf"), torch.float32, f"the cut network fails in {_culprit(cut, drawn)}: {one_line(error)}")


def _culprit(model: nn.Module, inputs: tuple) -> str:
    """The last operator of a run that fails."""
    last = LastOperator()
    try:
        with last:
            run(model, inputs)
    except Exception:
        return last.name or "the program itself"
    return "the program itself"


def _judge(expected: list[torch.Tensor], got: list[torch.Tensor], dtype: torch.dtype) -> Verdict:
    if [a.shape for a in expected] != [b.shape for b in got]:
        return Verdict(float("inf"), dtype, "its outputs have other shapes than the original's")
    worst = 0.0
    for a, b in zip(expected, got):
        if not a.numel():
            continue
        if not torch.isfinite(a).all():
            return Verdict(float("inf"), dtype, "the original's output on standard normal inputs is not finite")
        difference, scale = float((a - b).abs().max()), float(a.abs().max())
        worst = max(worst, difference / scale if scale > 0 else (float("inf") if difference > 0 else 0.0))
    if worst <= TOLERANCE[dtype]:
        return Verdict(worst, dtype)
    allowed = f"(allowed {TOLERANCE[dtype]:.0e})"
    return Verdict(worst, dtype, f"its output differs from the masked original's by {worst:.1e} of the largest output {allowed}")


def one_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
