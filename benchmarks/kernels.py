"""Sparse Triton kernels against cuBLAS, cuDNN and the sparse products that exist, on an NVIDIA GPU.

    python -m benchmarks.kernels [--part linear conv] [--shapes 14336x4096] [--sparsities 0.5 0.9] [--minutes 9] [--retry] [--out FOLDER]

Run it from the project's folder. Every case: the dense rival works on the masked weight (zeros included); all sides are CUDA graphs of 20
launches or more that go round copies of their weights larger than three times the second-level cache, replayed in turns; medians with 10th to
90th percentile. A side that computes something else than float64 within the data type's tolerance (float32: TF32's where torch's flags allow
TF32), or that fails, shows no speed. For each side the GB/s of what it reads and writes (packed weight with its indices, x and y) and their
share of the measured copy bandwidth are stored. Cases are measured in a process of their own; one that crashes is recorded as failed.
Writes kernels_<gpu>.json after every case and plots with the byte bound at the end; cases that the file holds of the same GPU and versions
are not measured again (failed ones are with `--retry`), so that a run can be cut by `--minutes` and continued.

Rivals: cuBLAS / cuDNN, torch CSR (cuSPARSE), torch BSR with its default and with swept settings, torch 2:4 (cuSPARSELt), blksprs where it
is installed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _timing
from benchmarks._rivals import BLOCK, Side, blksprs_blocks, rotate, size, torch_bsr, torch_csr, torch_two_four, tuned_bsr
from benchmarks._worker import Worker, failure_line
from kernels import SparseConv2d, SparseLinear, timing
from kernels.formats import Packed
from kernels.run16.reference import stored_bytes as run16_bytes
from kernels.table import device_name
from kernels.two_four.reference import parts
from kernels.vector_block.reference import stored_bytes as block_bytes

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
FACTS = ("kind", "name", "columns", "pattern", "sparsity")
CASE_SECONDS = 1200.0


def mask(rows: int, columns: int, sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """bool [rows, columns]: "random", "vectors" (64 rows share columns) or "blocks" (64 x 64, for BSR and blksprs)."""
    height, width = {"random": (1, 1), "vectors": (BLOCK, 1), "blocks": (BLOCK, BLOCK), "panels": (BLOCK, 16)}[pattern]
    shape = (-(-rows // height), -(-columns // width))
    keep = torch.rand(shape, generator=generator, device=generator.device) >= sparsity
    return keep.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def weight_bytes(packed: Packed) -> int:
    """What one product reads of a packed weight; the bits for the backward pass are not among it. 2:4 is 9 bits of every dense 16."""
    if packed.format == "two_four":
        _, remainder = parts(packed.values, packed.index)
        return packed.rows * packed.columns * packed.values.element_size() * 9 // 16 + run16_bytes(remainder, packed.index[1:])
    return (run16_bytes if packed.format == "run16" else block_bytes)(packed.values, packed.index)


def ours(layer: nn.Module, x: Tensor, format: str, **options) -> Side:
    """A packed form of `layer`."""
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    packed = kind.from_dense(layer, format=format, **options)

    def make() -> Callable[[], Tensor]:
        module = copy.deepcopy(packed)
        return lambda: module(x)

    return rotate(make, weight_bytes(packed.packed), x.device)


def dense(layer: nn.Module, x: Tensor) -> Side:
    """The dense layer."""
    def make() -> Callable[[], Tensor]:
        module = copy.deepcopy(layer)
        return lambda: module(x)

    return rotate(make, size([layer.weight]), x.device)


def compare(sides: dict[str, Callable[[], Side]], x: Tensor, expected: Tensor) -> dict[str, dict]:
    """Times of the sides (one that cannot be built has failed), with the bytes that each reads and writes."""
    built: dict[str, Side] = {}
    failures: dict[str, dict] = {}
    for name, build in sides.items():
        try:
            built[name] = build()
        except Exception as failure:
            failures[name] = {"failed": failure_line(failure)}
    result = _timing.compare_cuda({name: side.calls for name, side in built.items()}, expected)
    around = size([x]) + expected.numel() * x.element_size()
    for name, times in result.items():
        if "us" in times:
            times["bytes"] = built[name].weight_bytes + around
    return result | failures


class Matrix:
    """One masked matrix; its packed forms are made once (packing takes far longer than measuring) and used for all inputs."""

    def __init__(self, rows: int, columns: int, sparsity: float, pattern: str, dtype: torch.dtype, generator: torch.Generator) -> None:
        device = generator.device
        self.layer = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype).requires_grad_(False)
        values = torch.randn(rows, columns, generator=generator, device=device)
        self.layer.weight.copy_(values.mul_(mask(rows, columns, sparsity, pattern, generator)))
        self.pattern, self.generator = pattern, generator
        self._packed: dict[tuple, Side] = {}
        self._x: Tensor = torch.empty(0)

    def form(self, format: str, **options) -> Callable[[], Side]:
        """Builds a packed form, the same modules for every x."""
        def build() -> Side:
            key = (format, *sorted(options.items()))
            if key not in self._packed:
                packed = SparseLinear.from_dense(self.layer, format=format, **options)

                def make() -> Callable[[], Tensor]:
                    module = copy.deepcopy(packed)
                    return lambda: module(self._x)

                self._packed[key] = rotate(make, weight_bytes(packed.packed), self.layer.weight.device)
            return self._packed[key]

        return build

    def measure(self, batch: int, peers: bool) -> dict[str, dict]:
        """All sides of the product with `batch` columns of x."""
        layer, dtype = self.layer, self.layer.weight.dtype
        x = self._x = torch.randn(batch, layer.in_features, generator=self.generator, device=self.generator.device).to(dtype)
        sides: dict[str, Callable[[], Side]] = {"dense": lambda: dense(layer, x)}
        if self.pattern == "random":
            if batch <= 16:
                sides |= {f"run16 {name}": self.form("run16", coding=coding) for coding, name in enumerate(("nibbles", "bytes"))}
            if batch >= 64 and dtype != torch.float32:
                sides["two_four"] = self.form("two_four")
            if peers:
                sides["torch CSR"] = lambda: torch_csr(layer, x)
        else:
            sides |= {f"vector_block {height}": self.form("vector_block", height=height) for height in (64, 128)}
        if peers and self.pattern == "blocks":
            sides |= {"torch BSR default": lambda: torch_bsr(layer, x, None), "torch BSR tuned": lambda: tuned_bsr(layer, x)}
            if importlib.util.find_spec("blksprs"):
                sides["blksprs"] = lambda: blksprs_blocks(layer, x)
        result = compare(sides, x, x.double() @ layer.weight.double().t())
        if peers and self.pattern == "random" and dtype != torch.float32:
            result |= two_four_row(layer, x)
        return result


def two_four_row(layer: nn.Linear, x: Tensor) -> dict[str, dict]:
    """torch 2:4 beside the dense product; it computes with a matrix of its own, so only its speed is comparable."""
    try:
        side = torch_two_four(layer, x)
        plain, rival = timing.on_cuda([dense(layer, x).calls, side.calls])
    except Exception as failure:
        return {"torch 2:4": {"failed": failure_line(failure)}}
    return {"torch 2:4 (prunes further)": {"us": rival.median, "p10": rival.p10, "p90": rival.p90, "runs": rival.runs,
                                           "ratio": plain.median / rival.median,
                                           "bytes": side.weight_bytes + (x.numel() + x.shape[0] * layer.out_features) * x.element_size()}}


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
    sides: dict[str, Callable[[], Side]] = {"dense": lambda: dense(layer, x)}
    for height in (64, 128):
        sides[f"sparse_conv {height}"] = lambda height=height: ours(layer, x, "sparse_conv", height=height)
    sides["sparse_conv 64, full list"] = lambda: ours(layer, x, "sparse_conv", mask=torch.ones_like(keep))
    return compare(sides, x, nn.functional.conv2d(x.double(), layer.weight.double(), padding=kernel // 2))


def byte_bound(sparsity: float, itemsize: int = 2) -> float:
    """Dense bytes over run16's bytes (nibbles below 85 % sparsity, bytes above), padding left out."""
    value = 8 * itemsize
    return value / ((value + (5 if sparsity < 0.85 else 9)) * (1 - sparsity))


def describe(times: dict[str, dict], copy_gb_s: float) -> None:
    """Adds GB/s and the share of the copy bandwidth to every side."""
    for side in times.values():
        if "bytes" in side:
            side["gb_s"] = side["bytes"] / side["us"] / 1e3
            side["share_of_copy"] = side["gb_s"] / copy_gb_s


def cases(options: argparse.Namespace, known: set[tuple]) -> Iterator[dict[str, Any]]:
    """The facts of every case that is not in `known`; cases of the same matrix follow each other."""
    kinds = []
    if "linear" in options.part:
        names = [f"{rows}x{columns}" for rows, columns in LINEAR]
        kinds.append(("linear", names, ("random", "vectors", "blocks"), options.columns))
    if "conv" in options.part:
        kinds.append(("conv", [layer[0] for layer in CONVOLUTIONS], ("random", "panels"), BATCHES))
    for kind, names, patterns, batches in kinds:
        chosen = [name for name in names if not options.shapes or name in options.shapes]
        for name, sparsity, pattern, batch in itertools.product(chosen, options.sparsities, patterns, batches):
            if (kind, name, batch, pattern, sparsity) not in known:
                yield dict(zip(FACTS, (kind, name, batch, pattern, sparsity)))


@functools.lru_cache(maxsize=1)
def _matrix(name: str, pattern: str, sparsity: float, dtype: str, device: str) -> Matrix:
    rows, columns = map(int, name.split("x"))
    return Matrix(rows, columns, sparsity, pattern, getattr(torch, dtype), _generator(device, name, pattern, sparsity))


def _generator(device: str, *facts: object) -> torch.Generator:
    """The same masks whichever cases were measured before."""
    return torch.Generator(device=device).manual_seed(zlib.crc32(repr(facts).encode()))


def measure_case(job: dict[str, Any]) -> dict[str, dict]:
    """The times of one case: its facts, with "dtype", "peers" and "device"."""
    torch.backends.cudnn.benchmark = True
    name, pattern, sparsity, device = job["name"], job["pattern"], job["sparsity"], job["device"]
    with torch.no_grad():
        if job["kind"] == "linear":
            return _matrix(name, pattern, sparsity, job["dtype"], device).measure(job["columns"], job["peers"])
        _, inputs, outputs, kernel, pixels = next(layer for layer in CONVOLUTIONS if layer[0] == name)
        generator = _generator(device, name, pattern, sparsity)
        return convolution_case(inputs, outputs, kernel, pixels, job["columns"], sparsity, pattern, getattr(torch, job["dtype"]), generator)


def plots(rows: list[dict], folder: Path, name: str, itemsize: int) -> None:
    """Ratio against sparsity for every kind, pattern and number of columns; the fastest of this project's forms."""
    for kind, pattern, columns in sorted({(r["kind"], r["pattern"], r["columns"]) for r in rows}):
        curves: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            ratios = [t["ratio"] for side, t in r["times"].items() if "ratio" in t and side.startswith(OWN)]
            if (r["kind"], r["pattern"], r["columns"]) == (kind, pattern, columns) and ratios:
                curves.setdefault(r["name"], []).append((r["sparsity"], max(ratios)))
        if curves:
            def bound(sparsity: float, pattern: str = pattern) -> float:
                return byte_bound(sparsity, itemsize) if pattern == "random" else 1 / (1 - sparsity)

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
    parser.add_argument("--retry", action="store_true", help="measure cases again that failed before")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after so long")
    parser.add_argument("--out", type=Path, default=_timing.RESULTS, help="folder of the results")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs an NVIDIA GPU and none was found; benchmarks.kernels_cpu measures the CPU path")
    started, device, dtype = time.monotonic(), torch.device("cuda"), getattr(torch, options.dtype)
    copy_gb_s = _timing.copy_bandwidth(device)
    torch.cuda.empty_cache()
    suffix = "" if options.dtype == "bfloat16" else f"_{options.dtype}"
    name = "kernels_" + re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower() + suffix
    rows = [row for row in _timing.read(name, options.out) if not (options.retry and "failed" in row)]
    known = {tuple(row[key] for key in FACTS) for row in _timing.of_machine(rows, device)}
    worker = Worker(measure_case, CASE_SECONDS)
    for facts in cases(options, known):
        times = worker.run(facts | {"dtype": options.dtype, "peers": not options.no_peers, "device": "cuda"})
        failed = {"failed": times["failed"]} if "failed" in times else {}
        times = {} if failed else times
        describe(times, copy_gb_s)
        rows.append({"machine": device_name(device), **facts, **failed, "times": times})
        print(_timing.line(" ".join(map(str, facts.values())), times or failed), flush=True)
        _timing.write(name, device, rows, options.out)
        if time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes; the same command goes on", flush=True)
            break
    worker.close()
    plots(_timing.of_machine(rows, device), options.out, name, dtype.itemsize)


if __name__ == "__main__":
    main()
