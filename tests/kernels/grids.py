"""Runs kernels on several blocks and tiles in Triton's interpreter and prints one JSON line per case (started by test_grids.py)."""

from __future__ import annotations

import json

import torch

from kernels import formats

from .interpreted import relative_error
from .masks import masked


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    # Ten tiles are one group of eight and one of two; four chunks of x; eleven tiles of pixels.
    for name, batch, splits, more in (("vector_block", 150, 1, {"width": 16}), ("vector_block", 150, 3, {"width": 16}), ("run16", 27, 2, {}),
                                      ("run16", 32, 1, {})):
        shape = {"height": 16, "step": 16} if name == "vector_block" else {"warps": 1, "coding": 0}
        weight = masked(70, 130, 0.7, "random", generator)
        packed = formats.pack(name, weight, splits=splits, **shape, **more)
        x = torch.randn(batch, 130, generator=generator)
        y = formats.linear_operator(name)(x, packed.values, packed.index, None, None, None, 70, 130, packed.kept, list(packed.options), "none")
        print(json.dumps({"case": f"{name} {batch} {splits}", "error": relative_error(y, x.double() @ weight.double().t())}))
    for splits in (1, 2):
        weight = masked(40, 16 * 9, 0.7, "random", generator)
        packed = formats.pack("sparse_conv", weight, kernel=(3, 3), height=16, step=16, pixels=16, splits=splits)
        x = torch.randn(2, 16, 9, 9, generator=generator)
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
        y = formats.conv_operator("sparse_conv")(x, packed.values, packed.index, None, None, None, 40, 144, packed.kept, list(packed.options),
                                                 "none", *geometry)
        expected = torch.nn.functional.conv2d(x.double(), weight.double().view(40, 16, 3, 3), padding=1)
        print(json.dumps({"case": f"sparse_conv {splits}", "error": relative_error(y, expected)}))


if __name__ == "__main__":
    main()
