"""Launches, between guard bands in Triton's interpreter, a kernel that reads outside x (started by test_interpreter.py).

Usage: TRITON_INTERPRET=1 python -m tests.kernels.outside FIRST COUNT    reads x[FIRST : FIRST + COUNT] of 100 numbers and throws it away
"""

from __future__ import annotations

import faulthandler
import sys

import torch
import triton
import triton.language as tl

from .guarded import Guarded


@triton.jit
def reading_kernel(x, y, first, COUNT: tl.constexpr):
    seen = tl.load(x + first + tl.arange(0, COUNT))
    tl.store(y, tl.sum(tl.where(seen > 1e30, 1.0, 0.0), 0))


def main(first: int, count: int) -> None:
    faulthandler.enable()
    kernel, y = Guarded(reading_kernel), torch.zeros(1)
    for _ in range(3):
        kernel[(1,)](torch.ones(100), y, first, COUNT=count)
        assert float(y) == 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
