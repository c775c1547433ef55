"""Runs every kernel's cases in Triton's interpreter and prints one JSON line per case (started by test_interpreter.py).

Usage: TRITON_INTERPRET=1 python -m tests.kernels.interpreted CASES_PER_KERNEL [kernel ...]
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import warnings

import torch
from torch import Tensor

from kernels import epilogue, formats

from .guarded import Guarded
from .masks import PATTERNS, SPARSITIES, masked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Their dense part comes back rounded before the rest is added, so that they round twice.
ROUNDINGS = {"compact": 2, "two_four": 2}
# Format: (module that holds its kernel, kernel).
KERNELS = {
    "run16": ("run16", "run16_kernel"),
    "vector_block": ("vector_block", "vector_block_kernel"),
    "sparse_conv": ("sparse_conv", "sparse_conv_kernel"),
    "two_four": ("run16", "run16_kernel"),
    "compact": ("compact", "compact_decode_kernel"),
}


def guard(name: str) -> Guarded:
    """Replaces the kernel of a format by a guarded one."""
    folder, attribute = KERNELS[name]
    module = importlib.import_module(f"kernels.{folder}.triton")
    kernel = getattr(module, attribute)
    stand_in = Guarded(kernel.kernel if isinstance(kernel, Guarded) else kernel)
    setattr(module, attribute, stand_in)
    return stand_in


def pick(generator: torch.Generator, *choices):
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def options(name: str, generator: torch.Generator) -> dict:
    if name == "run16":
        return {"coding": pick(generator, 0, 1), "warps": pick(generator, 1, 2, 4), "splits": pick(generator, 0, 1, 2, 3)}
    if name == "vector_block":
        return {"height": pick(generator, 16, 64), "step": pick(generator, 16, 32), "width": pick(generator, 0, 16),
                "splits": pick(generator, 0, 1, 3)}
    if name == "compact":
        return {"words": pick(generator, 1, 4, 0)}
    return {}


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance; infinite where y is not finite."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    distance = float((y.double() - expected).norm())
    return distance / float(expected.norm()) if bool(expected.any()) else distance


def linear_case(name: str, number: int) -> dict:
    """One random case of `<name>_linear` against float64."""
    generator = torch.Generator().manual_seed(7919 * number + 13)
    dtype = DTYPES[number % 3]
    rows, columns, batch = (pick(generator, *sizes) for sizes in ((1, 33, 48), (1, 40, 129), (1, 1, 1, 2, 3, 7, 9)))
    pattern, sparsity = PATTERNS[number % len(PATTERNS)], SPARSITIES[number % len(SPARSITIES)]
    columns = 700 if pattern == "far" else columns
    rows = min(rows, 9) if name == "compact" else rows
    columns += -columns % 4 if name == "two_four" else 0
    weight = masked(rows, columns, sparsity, pattern, generator).to(dtype)
    if number % 10 == 9 and name != "compact":
        # Above 65,536 columns run16 stores them in 32 bits; such a row takes the compact kernel two thousand steps.
        weight = torch.nn.functional.pad(weight, (65_600 - columns // 4 * 4, 0))
        columns = weight.shape[1]
    chosen = options(name, generator)
    packed = formats.pack(name, weight, **chosen)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    if number % 4 == 0:
        x = torch.randn(columns, batch, generator=generator).to(dtype).t()
    vectors = [torch.randn(rows, generator=generator).to(dtype) if pick(generator, True, False) else None for _ in range(2)]
    residual = torch.randn(batch, rows, generator=generator).to(dtype) if pick(generator, True, False) else None
    activation = epilogue.ACTIVATIONS[number % 4]
    op = formats.linear_operator(name)
    y = op(x, packed.values, packed.index, *vectors, residual, rows, columns, packed.kept, list(packed.options), activation)
    wide = [None if t is None else t.double() for t in (*vectors, residual)]
    expected = epilogue.finish(x.double() @ weight.double().t(), *wide, activation)
    same = number % 5 > 0 or torch.equal(
        y, op(x, packed.values, packed.index, *vectors, residual, rows, columns, packed.kept, list(packed.options), activation)
    )
    case = f"{dtype} {rows}x{columns} batch {batch} {pattern} {sparsity} {chosen} {activation}"
    tolerance = TOLERANCE[dtype] * ROUNDINGS.get(name, 1)
    return {"kernel": name, "case": case, "error": relative_error(y, expected), "tolerance": tolerance, "same": same}


def convolution_case(number: int) -> dict:
    """One random case of `sparse_conv_conv2d` against float64."""
    generator = torch.Generator().manual_seed(104729 * number + 3)
    dtype = DTYPES[number % 3]
    channels, outputs, batch = (pick(generator, *sizes) for sizes in ((1, 5, 8, 16), (1, 10, 33), (1, 2)))
    kernel = pick(generator, (1, 1), (3, 3), (3, 2), (5, 3))
    stride, padding, dilation = pick(generator, (1, 1), (2, 1)), pick(generator, (0, 0), (1, 1), (2, 0)), pick(generator, (1, 1), (1, 2))
    height, width = pick(generator, 5, 7, 9), pick(generator, 5, 6, 9)
    pattern, sparsity = PATTERNS[number % len(PATTERNS)], SPARSITIES[number % len(SPARSITIES)]
    weight = masked(outputs, channels * kernel[0] * kernel[1], sparsity, pattern, generator).to(dtype)
    chosen = {"kernel": kernel, "height": pick(generator, 16, 32), "step": 16, "pixels": pick(generator, 0, 16)}
    chosen["splits"] = pick(generator, 0, 1, 3)
    packed = formats.pack("sparse_conv", weight, **chosen)
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    dense = weight.double().view(outputs, channels, *kernel)
    product = torch.nn.functional.conv2d(x.double(), dense, None, stride, padding, dilation)
    vectors = [torch.randn(outputs, generator=generator).to(dtype) if pick(generator, True, False) else None for _ in range(2)]
    residual = torch.randn(product.shape, generator=generator).to(dtype) if pick(generator, True, False) else None
    activation = epilogue.ACTIVATIONS[number % 4]
    expected = epilogue.finish(product, *[None if t is None else t.double() for t in (*vectors, residual)], activation, dim=1)
    x = x.contiguous(memory_format=torch.channels_last) if number % 2 else x

    def run() -> Tensor:
        op = formats.conv_operator("sparse_conv")
        shape = (outputs, weight.shape[1], packed.kept, list(packed.options))
        return op(x, packed.values, packed.index, *vectors, residual, *shape, activation, kernel, stride, padding, dilation)

    y = run()
    case = f"{dtype} {channels}x{height}x{width} to {outputs} batch {batch} {stride} {padding} {dilation} {pattern} {chosen} {activation}"
    same = (number % 5 > 0 or torch.equal(y, run())) and y.is_contiguous(memory_format=torch.channels_last)
    return {"kernel": "sparse_conv", "case": case, "error": relative_error(y, expected), "tolerance": TOLERANCE[dtype], "same": same}


def main(arguments: list[str]) -> None:
    count, names = int(arguments[0]), arguments[1:] or list(KERNELS)
    torch.set_num_threads(1)
    faulthandler.enable()
    warnings.simplefilter("ignore", RuntimeWarning)
    for name in names:
        stand_in = guard(name)
        for number in range(count):
            case = convolution_case(number) if name == "sparse_conv" else linear_case(name, number)
            print(json.dumps(case), flush=True)
        print(json.dumps({"kernel": name, "launches": stand_in.launches}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
