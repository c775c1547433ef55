"""Runs a Triton kernel on copies of its buffers that lie between guard bands, outputs filled with NaN beforehand.

Input bands hold NaN (-1 for integers, whose bits are NaN in words of 16- and 32-bit floats), so that a read outside a buffer shows in the
result, even times a weight of zero; all bands are compared afterwards, so that a write outside a buffer is found, too.

What is read and then thrown away shows in no result. On Linux a buffer therefore ends where a stretch of memory begins that may not be touched
(every third launch: begins where such a stretch ends): whoever reads or writes there is killed by SIGSEGV.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

BAND = 64
OUTPUTS = ("y", "partial")
# Bytes that may not be touched on either side: more than any of the tests' strides; they cost addresses, not memory.
FORBIDDEN = 2**22
PROTECTS = sys.platform == "linux"


class OutOfBounds(AssertionError):
    """A guard band was written."""


def _protected(count: int, dtype: torch.dtype, at_end: bool) -> tuple[Tensor, slice]:
    """(readable numbers with forbidden memory on both sides, place of `count` numbers that touch it): at the end, or at the start."""
    bytes_ = count * dtype.itemsize
    pages = -(-(bytes_ + BAND * dtype.itemsize) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * FORBIDDEN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for address in (start, start + FORBIDDEN + pages):
        if protect(address, FORBIDDEN, 0):
            raise OSError(ctypes.get_errno(), "mprotect refused")
    whole = torch.frombuffer(memory, dtype=dtype, count=pages // dtype.itemsize, offset=FORBIDDEN)
    return whole, slice(whole.numel() - count, None) if at_end else slice(0, count)


def surround(tensor: Tensor, poison: bool, at_end: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(inner view, whole buffer, copy of the whole buffer) with the values of `tensor`, or poison."""
    value = float("nan") if tensor.is_floating_point() else -1
    if PROTECTS:
        whole, place = _protected(tensor.numel(), tensor.dtype, at_end)
    else:
        whole, place = torch.empty(tensor.numel() + 2 * BAND, dtype=tensor.dtype), slice(BAND, BAND + tensor.numel())
    whole.fill_(value)
    inner = whole[place].view(tensor.shape)
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
                    inner, whole, before = surround(value, poison=name in OUTPUTS, at_end=self.launches % 3 > 0)
                    bands.append((name, value, inner, whole, before))
                    value = inner
                given.append(value)
            self.kernel[grid](*given, **constants)
            for name, original, inner, whole, before in bands:
                first = inner.storage_offset()
                for band in (slice(0, first), slice(first + inner.numel(), None)):
                    if not torch.equal(whole[band].view(torch.uint8), before[band].view(torch.uint8)):
                        raise OutOfBounds(f"{self.kernel.__name__} wrote outside {name}")
                if name in OUTPUTS:
                    original.copy_(inner)

        return run
