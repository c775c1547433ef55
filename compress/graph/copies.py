"""Copies of a network that may be run and cut without touching the original.

Meta copies carry shapes without numbers, so that a network of any size is traced in a fraction of a second. All copies are in
evaluation mode; the original's mode, buffers, gradients and the global random state stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.surgery import named_tensors


def as_arguments(example_inputs: Any) -> tuple:
    """Positional arguments: a tensor is one argument, a tuple is several."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _memo(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors that `copy.deepcopy` refuses: results of differentiable operations kept as attributes."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def real_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy in evaluation mode, floating-point parameters and buffers optionally in another precision."""
    memo = _memo(model)
    for tensor in named_tensors(model).values():
        data = tensor.detach().clone() if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo).eval()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters and buffers have shapes but no numbers."""
    memo = _memo(model)
    for tensor in named_tensors(model).values():
        data = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo).eval()


def to_meta(inputs: tuple) -> tuple:
    """The arguments with every tensor replaced by an empty one on the meta device."""
    return tree_map(lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf, inputs)


def random_like(inputs: tuple, seed: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple:
    """Standard normal numbers in place of every floating-point tensor; other tensors keep their values. On `device` where it is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            return leaf.to(device or leaf.device)
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(device=device or leaf.device, dtype=dtype or leaf.dtype)

    return tree_map(draw, inputs)


def float_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of any nested output, in order."""
    return [leaf for leaf in tree_leaves(output if not hasattr(output, "__dataclass_fields__") else vars(output))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def quiet() -> Iterator[None]:
    """Autograd and autocast off, the CPU's and the GPUs' random states as before on leaving."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
