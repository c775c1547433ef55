"""Running a network to measure it, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; train/eval flags, buffers and requires_grad as before outside, also after an exception.

    `.grad` is not protected: use `torch.autograd.grad` inside. Buffers get back both their values and their identity.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer, None if buffer is None else buffer.detach().clone())
               for module in model.modules() for name, buffer in module._buffers.items()]
    needs_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, value in needs_grad:
            if parameter.requires_grad != value:
                parameter.requires_grad_(value)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if buffer is not None and not _same(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def arguments(inputs: Tensor | tuple) -> tuple:
    """The positional arguments that `inputs` stands for: a tuple is unpacked, a tensor never."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def differentiable(tree: Any) -> Any:
    """`tree` with tensors made in inference mode replaced by copies that autograd accepts; to be called outside that mode."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, tree)
