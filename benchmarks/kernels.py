"""Sparse Triton kernels against cuBLAS, cuDNN and the sparse products that exist, on an NVIDIA GPU.

    python -m benchmarks.kernels [--part linear conv] [--shapes 14336x4096] [--sparsities 0.5 0.9] [--minutes 9] [--out FOLDER]

Run it from the project's folder. Every case: the dense rival works on the masked weight (zeros included); all sides are CUDA graphs of 20
launches that go round copies of their weights larger than three times the second-level cache, replayed in turns; medians with 10th to
90th percentile. A side that computes something else than float64 within the data type's tolerance, or that fails, shows no speed. For each
side the GB/s of its weights and their share of the measured copy bandwidth are stored. Writes kernels_<gpu>.json after every case and
plots with the byte bound at the end; cases that the file of the same GPU holds are not measured again, so that a run can be cut by
`--minutes` and continued.

Rivals: cuBLAS / cuDNN, torch CSR (cuSPARSE), torch BSR with its default and with swept settings, torch 2:4 (cuSPARSELt), blksprs where it
is installed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _timing
from benchmarks._rivals import BLOCK, blksprs_blocks, rotate, torch_bsr, torch_csr, torch_two_four, tuned_bsr
from kernels import SparseConv2d, SparseLinear, timing

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = (1, 8, 16, 64, 512)
LINEAR = [(14336, 4096), (4096, 4096), (8192, 28672), (11008, 4096), (4096, 11008), (4096, 25088), (3072, 768), (4096, 1024),
          (12288, 49152)]
# name, in channels, out channels, kernel, map
CONVOLUTIONS = [
    ("resnet50 3x3 56", 64, 64, 3, 56), ("resnet50 3x3 28", 128, 128, 3, 28), ("resnet50 3x3 14", 256, 256, 3, 14),
    ("resnet50 3x3 7", 512, 512, 3, 7),
    ("resnet50 1x1 56", 256, 64, 1, 56), ("resnet50 1x1 14", 1024, 256, 1, 14), ("resnet50 1x1 7", 512, 2048, 1, 7),
    ("vgg16 3x3 28", 512, 512, 3, 28), ("vgg16 3x3 14", 512, 512, 3, 14),
]
BATCHES = (1, 128)
OWN = ("run16", "vector_block", "two_four", "sparse_conv")
Calls = dict[str, list[Callable[[], Tensor]]]


def mask(rows: int, columns: int, sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """bool [rows, columns]: "random", "vectors" (64 rows share columns) or "blocks" (64 x 64, for BSR and blksprs)."""
    height, width = {"random": (1, 1), "vectors": (BLOCK, 1), "blocks": (BLOCK, BLOCK), "panels": (BLOCK, 16)}[pattern]
    shape = (-(-rows // height), -(-columns // width))
    keep = torch.rand(shape, generator=generator, device=generator.device) >= sparsity
    return keep.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def packed_copies(layer: nn.Module, format: str, **options) -> list[nn.Module]:
    """A packed form of `layer`, as often as the cold-cache rule needs."""
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    packed = kind.from_dense(layer, format=format, **options)
    size = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    return rotate(lambda: copy.deepcopy(packed), size, layer.weight.device)


def ours(layer: nn.Module, x: Tensor, format: str, **options) -> list[Callable[[], Tensor]]:
    """Calls of a packed form of `layer`."""
    return [lambda module=module: module(x) for module in packed_copies(layer, format, **options)]


def dense(layer: nn.Module, x: Tensor) -> list[Callable[[], Tensor]]:
    """Calls of the dense layer."""
    def make() -> Callable[[], Tensor]:
        module = copy.deepcopy(layer)
        return lambda: module(x)

    return rotate(make, layer.weight.numel() * layer.weight.element_size(), x.device)


def add(calls: Calls, name: str, build: Callable[[], list[Callable[[], Tensor]]], failures: dict[str, str]) -> None:
    """Builds a side of the comparison; one that cannot be built is recorded and left out."""
    try:
        calls[name] = build()
    except Exception as failure:
        failures[name] = (str(failure).splitlines() or [type(failure).__name__])[0]


class Matrix:
    """One masked matrix; its packed forms are made once (packing takes far longer than measuring) and used for all inputs."""

    def __init__(self, rows: int, columns: int, sparsity: float, pattern: str, dtype: torch.dtype, generator: torch.Generator) -> None:
        device = generator.device
        self.layer = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype).requires_grad_(False)
        values = torch.randn(rows, columns, generator=generator, device=device)
        self.layer.weight.copy_(values.mul_(mask(rows, columns, sparsity, pattern, generator)))
        self.pattern, self.generator = pattern, generator
        self._packed: dict[tuple, list[nn.Module]] = {}

    def form(self, x: Tensor, format: str, **options) -> list[Callable[[], Tensor]]:
        """Calls of a packed form."""
        key = (format, *sorted(options.items()))
        if key not in self._packed:
            self._packed[key] = packed_copies(self.layer, format, **options)
        return [lambda module=module: module(x) for module in self._packed[key]]

    def measure(self, batch: int, peers: bool) -> dict[str, dict]:
        """All sides of the product with `batch` columns of x."""
        layer, dtype = self.layer, self.layer.weight.dtype
        x = torch.randn(batch, layer.in_features, generator=self.generator, device=self.generator.device).to(dtype)
        calls: Calls = {"dense": dense(layer, x)}
        failures: dict[str, str] = {}
        if self.pattern == "random":
            if batch <= 16:
                for coding, name in enumerate(("nibbles", "bytes")):
                    add(calls, f"run16 {name}", lambda coding=coding: self.form(x, "run16", coding=coding), failures)
            if batch >= 64 and dtype != torch.float32:
                add(calls, "two_four", lambda: self.form(x, "two_four"), failures)
            if peers:
                add(calls, "torch CSR", lambda: torch_csr(layer, x), failures)
        else:
            for height in (64, 128):
                add(calls, f"vector_block {height}", lambda height=height: self.form(x, "vector_block", height=height), failures)
        if peers and self.pattern == "blocks":
            add(calls, "torch BSR default", lambda: torch_bsr(layer, x, None), failures)
            add(calls, "torch BSR tuned", lambda: tuned_bsr(layer, x), failures)
            if importlib.util.find_spec("blksprs"):
                add(calls, "blksprs", lambda: blksprs_blocks(layer, x), failures)
        expected = x.double() @ layer.weight.double().t()
        result = _timing.compare_cuda(calls, expected)
        if peers and self.pattern == "random" and dtype != torch.float32:
            result |= two_four_row(layer, x)
        return result | {name: {"failed": reason} for name, reason in failures.items()}


def two_four_row(layer: nn.Linear, x: Tensor) -> dict[str, dict]:
    """torch 2:4 beside the dense product; it computes with a matrix of its own, so only its speed is comparable."""
    try:
        plain, rival = timing.on_cuda([dense(layer, x), torch_two_four(layer, x)])
    except Exception as failure:
        return {"torch 2:4": {"failed": (str(failure).splitlines() or [""])[0]}}
    return {"torch 2:4 (prunes further)": {"us": rival.median, "p10": rival.p10, "p90": rival.p90, "runs": rival.runs,
                                           "ratio": plain.median / rival.median}}


def convolution_case(inputs: int, outputs: int, kernel: int, size: int, batch: int, sparsity: float, pattern: str, dtype: torch.dtype,
                     generator: torch.Generator) -> dict[str, dict]:
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
    calls: Calls = {"dense": dense(layer, x)}
    failures: dict[str, str] = {}
    for height in (64, 128):
        add(calls, f"sparse_conv {height}", lambda height=height: ours(layer, x, "sparse_conv", height=height), failures)
    add(calls, "sparse_conv 64, full list", lambda: ours(layer, x, "sparse_conv", mask=torch.ones_like(keep)), failures)
    expected = nn.functional.conv2d(x.double(), layer.weight.double(), padding=kernel // 2)
    return _timing.compare_cuda(calls, expected) | {name: {"failed": reason} for name, reason in failures.items()}


def byte_bound(sparsity: float) -> float:
    """Dense bytes over run16's bytes (nibbles below 85 % sparsity, bytes above), 16-bit values, padding left out."""
    return 16 / ((21 if sparsity < 0.85 else 25) * (1 - sparsity))


def describe(row: dict, bytes_dense: int, copy_gb_s: float) -> None:
    """Adds GB/s and the share of the copy bandwidth of reading the dense weight once, to every side."""
    for name, times in row["times"].items():
        if "us" in times:
            read = bytes_dense if name == "dense" else bytes_dense * (1 - row["sparsity"])
            times["weight_gb_s"] = read / times["us"] / 1e3
            times["share_of_copy"] = times["weight_gb_s"] / copy_gb_s


def cases(options: argparse.Namespace, generator: torch.Generator, known: set[tuple]) -> Iterator[tuple[dict[str, Any], int, dict[str, dict]]]:
    """(facts of a case, bytes of its dense weight, its times) for every case that is not in `known`."""
    dtype = getattr(torch, options.dtype)
    if "linear" in options.part:
        shapes = [shape for shape in LINEAR if not options.shapes or f"{shape[0]}x{shape[1]}" in options.shapes]
        for (rows, columns), sparsity, pattern in itertools.product(shapes, options.sparsities, ("random", "vectors", "blocks")):
            matrix = None
            for batch in options.columns:
                facts = {"kind": "linear", "name": f"{rows}x{columns}", "columns": batch, "pattern": pattern, "sparsity": sparsity}
                if tuple(facts.values()) not in known:
                    matrix = matrix or Matrix(rows, columns, sparsity, pattern, dtype, generator)
                    yield facts, rows * columns * dtype.itemsize, matrix.measure(batch, not options.no_peers)
    if "conv" in options.part:
        layers = [layer for layer in CONVOLUTIONS if not options.shapes or layer[0] in options.shapes]
        for layer, sparsity, pattern, batch in itertools.product(layers, options.sparsities, ("random", "panels"), BATCHES):
            label, inputs, outputs, kernel, size = layer
            facts = {"kind": "conv", "name": label, "columns": batch, "pattern": pattern, "sparsity": sparsity}
            if tuple(facts.values()) not in known:
                times = convolution_case(inputs, outputs, kernel, size, batch, sparsity, pattern, dtype, generator)
                yield facts, inputs * outputs * kernel**2 * dtype.itemsize, times


def plots(rows: list[dict], folder: Path, name: str) -> None:
    """Ratio against sparsity for every kind, pattern and number of columns; the fastest of this project's forms."""
    for kind, pattern, columns in sorted({(r["kind"], r["pattern"], r["columns"]) for r in rows}):
        curves: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            ratios = [t["ratio"] for side, t in r["times"].items() if "ratio" in t and side.startswith(OWN)]
            if (r["kind"], r["pattern"], r["columns"]) == (kind, pattern, columns) and ratios:
                curves.setdefault(r["name"], []).append((r["sparsity"], max(ratios)))
        if curves:
            bound = byte_bound if pattern == "random" else lambda s: 1 / (1 - s)
            _timing.plot(folder / f"{name}_{kind}_{pattern}_{columns}.png", f"{kind}, {pattern} mask, N {columns}", curves, bound)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["linear", "conv"], choices=["linear", "conv"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=[], help="names of layers, such as 14336x4096 or 'resnet50 3x3 14'; all where none is given")
    parser.add_argument("--columns", nargs="+", type=int, default=list(COLUMNS), help="columns of x of the matrix products")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--no-peers", action="store_true", help="only dense and this project's kernels")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after so long")
    parser.add_argument("--out", type=Path, default=_timing.RESULTS, help="folder of the results")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs an NVIDIA GPU and none was found; benchmarks.kernels_cpu measures the CPU path")
    started, device = time.monotonic(), torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    copy_gb_s = _timing.copy_bandwidth(device)
    suffix = "" if options.dtype == "bfloat16" else f"_{options.dtype}"
    name = "kernels_" + re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower() + suffix
    rows = _timing.read(name, options.out)
    known = {tuple(row[key] for key in ("kind", "name", "columns", "pattern", "sparsity")) for row in rows}
    with torch.no_grad():
        for facts, bytes_dense, times in cases(options, torch.Generator(device=device).manual_seed(0), known):
            rows.append(facts | {"times": times})
            describe(rows[-1], bytes_dense, copy_gb_s)
            print(_timing.line(" ".join(map(str, facts.values())), times), flush=True)
            _timing.write(name, device, rows, options.out)
            if time.monotonic() - started > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes; the same command goes on", flush=True)
                break
    plots(rows, options.out, name)


if __name__ == "__main__":
    main()
