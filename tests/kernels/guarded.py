"""Runs a Triton kernel on copies of its buffers that lie between guard bands, outputs filled with NaN beforehand.

Input bands hold NaN (-1 for integers, whose bits are NaN in words of 16- and 32-bit floats), so that a read outside a buffer shows in the
result, even times a weight of zero; all bands are compared afterwards, so that a write outside a buffer is found, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

BAND = 64
OUTPUTS = ("y", "partial")


class OutOfBounds(AssertionError):
    """A guard band was written."""


def _surround(tensor: Tensor, poison: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(inner view, whole buffer, copy of the whole buffer) with the values of `tensor`, or poison."""
    value = float("nan") if tensor.is_floating_point() else -1
    whole = torch.full((tensor.numel() + 2 * BAND,), value, dtype=tensor.dtype)
    inner = whole[BAND : BAND + tensor.numel()].view(tensor.shape)
    if not poison:
        inner.copy_(tensor)
    return inner, whole, whole.clone()


class Guarded:
    """Stands in for a kernel: `Guarded(kernel)[grid](...)` launches it on guarded copies and copies written buffers back."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        def run(*args, **constants) -> None:
            self.launches += 1
            names = self.kernel.arg_names[: len(args)]
            given, bands = [], []
            for name, value in zip(names, args):
                if isinstance(value, Tensor):
                    if not value.is_contiguous():
                        raise AssertionError(f"{name} reached the kernel without being contiguous")
                    inner, whole, before = _surround(value, poison=name in OUTPUTS)
                    bands.append((name, value, inner, whole, before))
                    value = inner
                given.append(value)
            self.kernel[grid](*given, **constants)
            for name, original, inner, whole, before in bands:
                for band in (slice(0, BAND), slice(whole.numel() - BAND, None)):
                    if not torch.equal(whole[band].view(torch.uint8), before[band].view(torch.uint8)):
                        raise OutOfBounds(f"{self.kernel.__name__} wrote outside {name}")
                if name in OUTPUTS:
                    original.copy_(inner)

        return run
