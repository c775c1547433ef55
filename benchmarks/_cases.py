"""The cases of the GPU benchmark: masked matrices and convolutions, and which sides are measured on each."""

from __future__ import annotations

import functools
import importlib.util
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._own import Form
from benchmarks._rivals import BLOCK, blksprs_blocks, default_bsr, dense, torch_csr, torch_two_four, tuned_bsr
from benchmarks._sides import Side, compare

LINEAR = [(14336, 4096), (4096, 4096), (8192, 28672), (11008, 4096), (4096, 11008), (4096, 25088), (3072, 768), (4096, 1024),
          (12288, 49152)]
# name, in channels, out channels, kernel, map
CONVOLUTIONS = [
    ("resnet50 3x3 56", 64, 64, 3, 56), ("resnet50 3x3 28", 128, 128, 3, 28), ("resnet50 3x3 14", 256, 256, 3, 14),
    ("resnet50 3x3 7", 512, 512, 3, 7),
    ("resnet50 1x1 56", 256, 64, 1, 56), ("resnet50 1x1 14", 1024, 256, 1, 14), ("resnet50 1x1 7", 512, 2048, 1, 7),
    ("vgg16 3x3 28", 512, 512, 3, 28), ("vgg16 3x3 14", 512, 512, 3, 14),
]
# Formats that the cases of a kind and pattern run through.
FORMATS = {("linear", "random"): ("run16", "two_four"), ("linear", "vectors"): ("vector_block",), ("linear", "blocks"): ("vector_block",),
           ("conv", "random"): ("sparse_conv",), ("conv", "panels"): ("sparse_conv",)}


def mask(rows: int, columns: int, sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """bool [rows, columns]: "random", "vectors" (64 rows share columns), "blocks" (64 x 64, for BSR and blksprs) or "panels" (64 x 16)."""
    height, width = {"random": (1, 1), "vectors": (BLOCK, 1), "blocks": (BLOCK, BLOCK), "panels": (BLOCK, 16)}[pattern]
    shape = (-(-rows // height), -(-columns // width))
    keep = torch.rand(shape, generator=generator, device=generator.device) >= sparsity
    return keep.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


class Matrix:
    """One masked matrix; its packed forms are made once (packing takes far longer than measuring) and used for all inputs."""

    def __init__(self, rows: int, columns: int, sparsity: float, pattern: str, dtype: torch.dtype, generator: torch.Generator) -> None:
        device = generator.device
        self.layer = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype).requires_grad_(False)
        values = torch.randn(rows, columns, generator=generator, device=device)
        self.layer.weight.copy_(values.mul_(mask(rows, columns, sparsity, pattern, generator)))
        self.pattern, self.generator = pattern, generator
        self._forms: dict[tuple, Form] = {}

    def form(self, format: str, **options) -> Form:
        """A packed form, the same for every x."""
        key = (format, *sorted(options.items()))
        if key not in self._forms:
            self._forms[key] = Form(self.layer, format, **options)
        return self._forms[key]

    def measure(self, batch: int, peers: bool, tuning: float) -> dict[str, dict]:
        """All sides of the product with `batch` columns of x; `tuning` seconds for the settings of one side."""
        layer, dtype = self.layer, self.layer.weight.dtype
        x = torch.randn(batch, layer.in_features, generator=self.generator, device=self.generator.device).to(dtype)
        expected = x.double() @ layer.weight.double().t()
        sides: dict[str, Callable[[], Side]] = {"dense": lambda: dense(layer, x)}

        def own(name: str, format: str, **options) -> None:
            sides[name] = lambda: self.form(format, **options).side(x, expected, tuning)

        if self.pattern == "random":
            if batch <= 16:
                for coding, name in enumerate(("nibbles", "bytes")):
                    own(f"run16 {name}", "run16", coding=coding)
            if batch >= 64 and dtype != torch.float32:
                own("two_four", "two_four")
            if peers:
                sides["torch CSR"] = lambda: torch_csr(layer, x, expected, tuning)
            if peers and dtype != torch.float32:
                sides["torch 2:4 (prunes further)"] = lambda: torch_two_four(layer, x, tuning)
        else:
            for height in (64, 128):
                own(f"vector_block {height}", "vector_block", height=height)
        if peers and self.pattern == "blocks":
            sides |= {"torch BSR default": lambda: default_bsr(layer, x), "torch BSR tuned": lambda: tuned_bsr(layer, x, expected, tuning)}
            if importlib.util.find_spec("blksprs"):
                sides["blksprs"] = lambda: blksprs_blocks(layer, x)
        return compare(sides, x, expected)


def convolution_case(inputs: int, outputs: int, kernel: int, size: int, batch: int, sparsity: float, pattern: str, dtype: torch.dtype,
                     generator: torch.Generator, tuning: float) -> dict[str, dict]:
    """cuDNN (channels_last, benchmark mode) against sparse_conv with the mask's list, and with a full list to tell fusion from sparsity."""
    device = generator.device
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, device=device, dtype=dtype).requires_grad_(False)
    columns = inputs * kernel * kernel
    keep = mask(outputs, columns, sparsity, pattern, generator).view(outputs, kernel * kernel, inputs)
    keep = keep.transpose(1, 2).reshape(layer.weight.shape)
    values = torch.randn(layer.weight.shape, generator=generator, device=device).to(dtype)
    layer.weight.copy_(values * keep)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, inputs, size, size, generator=generator, device=device).to(dtype, memory_format=torch.channels_last)
    expected = nn.functional.conv2d(x.double(), layer.weight.double(), padding=kernel // 2)
    sides: dict[str, Callable[[], Side]] = {"dense": lambda: dense(layer, x)}

    def own(name: str, **options) -> None:
        sides[name] = lambda: Form(layer, "sparse_conv", **options).side(x, expected, tuning)

    for height in (64, 128):
        own(f"sparse_conv {height}", height=height)
    own("sparse_conv 64, full list", mask=torch.ones_like(keep))
    return compare(sides, x, expected)


@functools.lru_cache(maxsize=1)
def _matrix(name: str, pattern: str, sparsity: float, dtype: str, device: str) -> Matrix:
    rows, columns = map(int, name.split("x"))
    return Matrix(rows, columns, sparsity, pattern, getattr(torch, dtype), _generator(device, name, pattern, sparsity))


def _generator(device: str, *facts: object) -> torch.Generator:
    """The same masks whichever cases were measured before."""
    return torch.Generator(device=device).manual_seed(zlib.crc32(repr(facts).encode()))


def measure_case(job: dict[str, Any]) -> dict[str, dict]:
    """The times of one case: its facts, with "dtype", "peers", "tuning" and "device"."""
    torch.backends.cudnn.benchmark = True
    name, pattern, sparsity, device = job["name"], job["pattern"], job["sparsity"], job["device"]
    with torch.no_grad():
        if job["kind"] == "linear":
            return _matrix(name, pattern, sparsity, job["dtype"], device).measure(job["columns"], job["peers"], job["tuning"])
        _, inputs, outputs, kernel, pixels = next(layer for layer in CONVOLUTIONS if layer[0] == name)
        return convolution_case(inputs, outputs, kernel, pixels, job["columns"], sparsity, pattern, getattr(torch, job["dtype"]),
                                _generator(device, name, pattern, sparsity), job["tuning"])
