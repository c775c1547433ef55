"""Running a network to measure it, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    restore = keep_buffers(model)
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
        restore()


@torch.no_grad()
def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """What gives the buffers of `model` back their identity, shape and values of now.

    Only what changed is written: a buffer may be a view that cannot be written to (`expand`).
    """
    kept = [(module, {name: (buffer, None if buffer is None else (buffer.detach(), buffer.detach().clone())) for name, buffer in module._buffers.items()})
            for module in model.modules()]

    @torch.no_grad()
    def restore() -> None:
        for module, buffers in kept:
            for name, (buffer, held) in buffers.items():
                if held is not None and not _same(buffer, held[1]):
                    if buffer.shape != held[1].shape:
                        buffer.data = held[0].data
                    if not _same(buffer, held[1]):
                        buffer.copy_(held[1])
                module._buffers[name] = buffer

    return restore


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def arguments(inputs: Tensor | tuple) -> tuple:
    """The positional arguments that `inputs` stands for: a tuple is unpacked, a tensor never."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def differentiable(tree: Any) -> Any:
    """`tree` with tensors made in inference mode replaced by copies that autograd accepts; to be called outside that mode."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, tree)
