"""Runs cpu.c on buffers that lie against memory which may not be touched (started by test_compiled_csr.py).

Usage: python -m tests.kernels.bounds SLACK. Behind a dense operand that is copied lie SLACK floats: 15 is what cpu.c may read. A read or write
outside of a buffer ends the process with SIGSEGV; a write into the band on a buffer's other side fails an assertion.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.csr import compiled, reference

from .guarded import surround

WIDTHS = (1, 3, 4, 5, 8, 9, 16, 17, 33, 64, 100, 128, 129, 200, 257)
GEOMETRIES = [((7, 7), 3, 1, 1, 1), ((9, 40), 3, 2, 1, 1), ((12, 12), 5, 1, 0, 2), ((1, 1), 1, 1, 0, 1), ((11, 13), 3, 3, 2, 1)]


class Memory:
    """Hands out guarded buffers and compares their bands."""

    def __init__(self) -> None:
        self.taken: list[tuple[Tensor, Tensor, Tensor]] = []

    def hold(self, tensor: Tensor, poison: bool = False, at_end: bool = True) -> Tensor:
        self.taken.append(surround(tensor, poison, at_end))
        return self.taken[-1][0]

    def check(self) -> None:
        for inner, whole, before in self.taken:
            first = inner.storage_offset()
            for band in (slice(0, first), slice(first + inner.numel(), None)):
                assert torch.equal(whole[band].view(torch.uint8), before[band].view(torch.uint8)), "written outside of a buffer"
        self.taken.clear()


def main(slack: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library, memory = compiled.library(), Memory()

    def with_slack(x: Tensor) -> Tensor:
        padded = memory.hold(torch.cat([x.reshape(-1), torch.zeros(slack)]))
        return padded[: x.numel()].view(x.shape)

    def run(expected: Tensor, call, x: Tensor, weight: Tensor, at_end: bool) -> None:
        values, index = reference.pack(weight, narrow=at_end)
        bias = memory.hold(torch.randn(weight.shape[0]), at_end=at_end)
        given = memory.hold(x, at_end=at_end), memory.hold(values, at_end=at_end), *(memory.hold(t, at_end=at_end) for t in index), bias
        torch.Tensor.new_empty = lambda self, *size: memory.hold(torch.zeros(*size), poison=True, at_end=at_end)
        try:
            y = call(*given)
        finally:
            torch.Tensor.new_empty = plain
        rows = {1: (-1,), 2: (-1, 1), 4: (-1, 1, 1)}[y.ndim]
        torch.testing.assert_close(y.double(), expected + bias.double().view(rows), rtol=1e-4, atol=1e-4)
        memory.check()

    def product(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor) -> Tensor:
        return compiled.matrix(library, x, values, crow, col, bias, False, 1)

    plain, compiled._with_slack = torch.Tensor.new_empty, with_slack
    settings = compiled.NEAR, compiled.WORK, compiled.VECTORS, compiled.REUSE
    for chosen, at_end in itertools.product((settings, (2000, 0, 0, 100)), (True, False)):
        compiled.NEAR, compiled.WORK, compiled.VECTORS, compiled.REUSE = chosen
        for n in WIDTHS:
            weight = torch.randn(37, 43) * (torch.rand(37, 43) < 0.6)
            x = torch.randn(43, n)
            run(weight.double() @ x.double(), product, x, weight, at_end)
        vector = torch.randn(43)
        run(weight.double() @ vector.double(), lambda *given: compiled.vector(library, *given, False, 1), vector, weight, at_end)
        for size, kernel, stride, padding, dilation in GEOMETRIES:
            weight = torch.randn(9, 4 * kernel**2) * (torch.rand(9, 4 * kernel**2) < 0.6)
            x = torch.randn(2, 4, *size)
            expected = F.conv2d(x.double(), weight.double().unflatten(1, (4, kernel, kernel)), None, stride, padding, dilation)

            def convolved(x: Tensor, *given: Tensor, size=tuple(expected.shape[2:]), geometry=(kernel, stride, padding, dilation)) -> Tensor:
                return compiled.convolve(library, x, size, *((number, number) for number in geometry), *given, False, 1)

            run(expected, convolved, x, weight, at_end)
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
