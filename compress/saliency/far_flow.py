"""Positive flow beyond the range of floating point: every activation is kept near 1 by a power of two that is remembered beside it.

An activation x stands for x * 2^e. Layers, normalisation and pooling are homogeneous of degree 1 and hand e on; summands and parts of a
concatenation are brought to the largest e first, where a summand 2^1074 times smaller than another is lost. Multiplying by powers of
two is exact, and for the gradient they are constants: the derivative of the output mantissa is that of the flow times 2^-e of the output, for
every weight alike. A ResNet-1202, whose flow is near 10^1500, is ranked in this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.saliency.flow import WEIGHTED, PositiveFlow

_LIMIT = 2.0**64
_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul}


class FarFlow(PositiveFlow):
    """`PositiveFlow` with remembered exponents; `exponent(output)` tells that of the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Tensors are held with their exponents, so that no other one can come to have their identity.
        self.known: dict[int, tuple[Tensor, int]] = {}
        self.top = 0

    def exponent(self, x: Tensor) -> int:
        """e of the activation x; 0 for tensors that no layer has given."""
        return self.known[id(x)][1] if id(x) in self.known else 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in _tensors((args, tuple(kwargs.values()))) if id(x) in self.known]
        exponents = [self.exponent(x) for x in inputs]
        if func in _PRODUCTS and len(inputs) == 2:
            self.top = sum(exponents)
        else:
            self.top = max(exponents, default=0)
            if len(set(exponents)) > 1:
                args, kwargs = self.aligned(args), {key: self.aligned(value) for key, value in kwargs.items()}
        output = super().__torch_function__(func, types, args, kwargs)
        if not inputs and func not in WEIGHTED:
            return output
        return _mapped(output, lambda x: self.kept(x, inplace=any(x is y for y in inputs)))

    def aligned(self, value: Any) -> Any:
        """`value` with its activations divided by 2^(top - e)."""

        def align(x: Tensor) -> Tensor:
            gap = self.top - self.exponent(x)
            return _shifted(x, -gap) if id(x) in self.known and gap else x

        return _mapped(value, align)

    def kept(self, x: Tensor, inplace: bool) -> Tensor:
        """Remember the exponent of a result, after bringing it near 1."""
        if not x.is_floating_point():
            return x
        exponent, peak = self.top, float(x.detach().abs().amax()) if x.numel() else 1.0
        if not inplace and math.isfinite(peak) and peak and not 1 / _LIMIT < peak < _LIMIT:
            shift = math.frexp(peak)[1]
            x, exponent = _shifted(x, -shift), exponent + shift
        self.known[id(x)] = x, exponent
        return x

    def bias(self, bias: Tensor) -> Tensor:
        """A bias is a number of exponent 0 that is added to an activation of exponent `top`."""
        return _shifted(bias, -self.top)


def _shifted(x: Tensor, exponent: int) -> Tensor:
    """x * 2^exponent, in steps that stay in range."""
    while exponent:
        step = max(-1000, min(1000, exponent))
        x, exponent = x * 2.0**step, exponent - step
    return x


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to each tensor in it, through lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(item, function) for item in value) if type(value) in (list, tuple) else value
