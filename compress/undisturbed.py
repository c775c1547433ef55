"""Running a network to measure it, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


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
            parameter.requires_grad_(value)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if buffer is not None and not _same(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def arguments(inputs: torch.Tensor | tuple) -> tuple:
    """The positional arguments that `inputs` stands for: a tuple is unpacked, a tensor never."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
