"""Sparse Triton kernels against cuBLAS, cuDNN and the sparse products that exist, on an NVIDIA GPU.

    python -m benchmarks.kernels [--part linear conv] [--quick] [--dtype bfloat16]

Run it from the project's folder. Every case: the dense rival works on the masked weight (zeros included); all sides are CUDA graphs of 20
launches that go round
copies of their weights larger than three times the second-level cache, replayed in turns; medians with 10th to 90th percentile. A side
that computes something else than float64 within the data type's tolerance, or that fails, shows no speed. For each side the GB/s of
its weights and their share of the measured copy bandwidth are stored. Writes results/kernels_<gpu>.json and plots with the byte bound.

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
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import _timing
from kernels import SparseConv2d, SparseLinear, timing

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = (1, 8, 16, 64, 512)
LINEAR = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (8192, 28672), (12288, 49152), (3072, 768), (4096, 1024),
          (4096, 25088)]
# name, in channels, out channels, kernel, map
CONVOLUTIONS = [
    ("resnet50 3x3 56", 64, 64, 3, 56), ("resnet50 3x3 28", 128, 128, 3, 28), ("resnet50 3x3 14", 256, 256, 3, 14),
    ("resnet50 3x3 7", 512, 512, 3, 7),
    ("resnet50 1x1 56", 256, 64, 1, 56), ("resnet50 1x1 14", 1024, 256, 1, 14), ("resnet50 1x1 7", 512, 2048, 1, 7),
    ("vgg16 3x3 28", 512, 512, 3, 28), ("vgg16 3x3 14", 512, 512, 3, 14),
]
BATCHES = (1, 128)
BLOCK = 64
OWN = ("run16", "vector_block", "two_four", "sparse_conv")
BSR_SETTINGS = [{"SPLIT_N": n, "GROUP_SIZE_ROW": 4, "num_warps": w, "num_stages": s} for n in (1, 2, 4, 8) for w in (4, 8) for s in (1, 3)]
Calls = dict[str, list[Callable[[], Tensor]]]


def mask(rows: int, columns: int, sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """bool [rows, columns]: "random", "vectors" (64 rows share columns) or "blocks" (64 x 64, for BSR and blksprs)."""
    height, width = {"random": (1, 1), "vectors": (BLOCK, 1), "blocks": (BLOCK, BLOCK), "panels": (BLOCK, 16)}[pattern]
    shape = (-(-rows // height), -(-columns // width))
    keep = torch.rand(shape, generator=generator, device=generator.device) >= sparsity
    return keep.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def rotate(make: Callable[[], Callable[[], Tensor]], bytes_each: int, device: torch.device) -> list[Callable[[], Tensor]]:
    """The same call on as many copies of its weight as the cold-cache rule needs; `make` builds one copy."""
    return [make() for _ in range(timing.copies_needed(bytes_each, device))]


def ours(layer: nn.Module, x: Tensor, format: str, **options) -> list[Callable[[], Tensor]]:
    """Calls of a packed form of `layer`."""
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    packed = kind.from_dense(layer, format=format, **options)
    size = sum(t.numel() * t.element_size() for t in packed.state_dict().values())

    def make() -> Callable[[], Tensor]:
        module = copy.deepcopy(packed)
        return lambda: module(x)

    return rotate(make, size, x.device)


def dense(layer: nn.Module, x: Tensor) -> list[Callable[[], Tensor]]:
    """Calls of the dense layer."""
    def make() -> Callable[[], Tensor]:
        module = copy.deepcopy(layer)
        return lambda: module(x)

    return rotate(make, layer.weight.numel() * layer.weight.element_size(), x.device)


def torch_csr(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    csr = layer.weight.detach().to_sparse_csr()
    transposed = x.t().contiguous()

    def make() -> Callable[[], Tensor]:
        weight = csr.clone()
        return lambda: (weight @ transposed).t()

    return rotate(make, csr.values().numel() * (csr.values().element_size() + 8), x.device)


def torch_bsr(layer: nn.Linear, x: Tensor, settings: dict | None) -> list[Callable[[], Tensor]]:
    from torch.sparse._triton_ops import bsr_dense_addmm

    bsr = layer.weight.detach().to_sparse_bsr((BLOCK, BLOCK))
    transposed = x.t().contiguous()
    target = x.new_zeros(layer.out_features, x.shape[0])

    def make() -> Callable[[], Tensor]:
        weight = bsr.clone()
        return lambda: bsr_dense_addmm(target, weight, transposed, beta=0, meta=settings).t()

    return rotate(make, bsr.values().numel() * bsr.values().element_size(), x.device)


def tuned_bsr(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    """The fastest of a small sweep of settings, so that the rival is no straw man."""
    best, fastest = None, float("inf")
    for settings in BSR_SETTINGS:
        try:
            (taken,) = timing.on_cuda([torch_bsr(layer, x, settings)], rounds=5)
        except Exception:
            continue
        if taken.median < fastest:
            best, fastest = settings, taken.median
    if best is None:
        raise RuntimeError("no setting of torch BSR ran")
    return torch_bsr(layer, x, best)


def torch_two_four(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    """torch's 2:4 tensor of the two largest of every four: another matrix than the masked one, so its error is against its own product."""
    from torch.sparse import to_sparse_semi_structured

    fours = layer.weight.detach().view(layer.out_features, -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, fours.abs().topk(2, -1).indices, True)
    pruned = (fours * kept).view_as(layer.weight)

    def make() -> Callable[[], Tensor]:
        weight = to_sparse_semi_structured(pruned)
        return lambda: nn.functional.linear(x, weight)

    return rotate(make, pruned.numel() * pruned.element_size() // 2, x.device)


def blksprs_blocks(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    """blksprs: dense x (as one full block matrix) times the block-sparse transposed weight."""
    import blksprs as bs
    from blksprs.utils.blksprs_tensor import BlksprsTensor

    weight = layer.weight.detach().t().contiguous()[None]
    rows = -(-x.shape[0] // BLOCK) * BLOCK
    padded = nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))[None].contiguous()
    full = torch.ones(1, rows // BLOCK, x.shape[1] // BLOCK, dtype=torch.bool, device=x.device)
    layout = weight.view(1, weight.shape[1] // BLOCK, BLOCK, weight.shape[2] // BLOCK, BLOCK).any(4).any(2)
    out = torch.ones(1, rows // BLOCK, weight.shape[2] // BLOCK, dtype=torch.bool, device=x.device)
    left: BlksprsTensor = bs.ops.to_sparse(padded, full, BLOCK)
    right = bs.ops.to_sparse(weight, layout, BLOCK)

    def make() -> Callable[[], Tensor]:
        stored = right.clone()
        return lambda: bs.ops.to_dense(bs.ops.matmul(left, full, stored, layout, out, BLOCK), out, BLOCK)[0, : x.shape[0]]

    return rotate(make, right.numel() * right.element_size(), x.device)


def add(calls: Calls, name: str, build: Callable[[], list[Callable[[], Tensor]]], failures: dict[str, str]) -> None:
    """Builds a side of the comparison; one that cannot be built is recorded and left out."""
    try:
        calls[name] = build()
    except Exception as failure:
        failures[name] = (str(failure).splitlines() or [type(failure).__name__])[0]


def linear_case(rows: int, columns: int, batch: int, sparsity: float, pattern: str, dtype: torch.dtype, generator: torch.Generator,
                peers: bool) -> dict[str, dict]:
    """All sides of one matrix product."""
    layer = nn.Linear(columns, rows, bias=False, device=generator.device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns, generator=generator, device=generator.device) * mask(rows, columns, sparsity, pattern,
                                                                                                       generator))
    x = torch.randn(batch, columns, generator=generator, device=generator.device).to(dtype)
    calls: Calls = {"dense": dense(layer, x)}
    failures: dict[str, str] = {}
    if pattern == "random":
        if batch <= 16:
            for coding, name in enumerate(("nibbles", "bytes")):
                add(calls, f"run16 {name}", lambda coding=coding: ours(layer, x, "run16", coding=coding), failures)
        if batch >= 64 and dtype != torch.float32:
            add(calls, "two_four", lambda: ours(layer, x, "two_four"), failures)
        if peers:
            add(calls, "torch CSR", lambda: torch_csr(layer, x), failures)
    else:
        for height in (64, 128):
            add(calls, f"vector_block {height}", lambda height=height: ours(layer, x, "vector_block", height=height), failures)
    if peers and pattern == "blocks":
        add(calls, "torch BSR default", lambda: torch_bsr(layer, x, None), failures)
        add(calls, "torch BSR tuned", lambda: tuned_bsr(layer, x), failures)
        if importlib.util.find_spec("blksprs"):
            add(calls, "blksprs", lambda: blksprs_blocks(layer, x), failures)
    expected = x.double() @ layer.weight.double().t()
    result = _timing.compare_cuda(calls, expected)
    if peers and pattern == "random" and dtype != torch.float32:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["linear", "conv"], choices=["linear", "conv"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="two matrices, two convolutions")
    parser.add_argument("--no-peers", action="store_true", help="only dense and this project's kernels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs an NVIDIA GPU and none was found; benchmarks.kernels_cpu measures the CPU path")
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(device=device).manual_seed(0)
    copy_gb_s = _timing.copy_bandwidth(device)
    suffix = "" if options.dtype == "bfloat16" else f"_{options.dtype}"
    name = "kernels_" + re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower() + suffix
    rows: list[dict] = []

    def keep(kind: str, label: str, columns: int, pattern: str, sparsity: float, times: dict, bytes_dense: int) -> None:
        row = {"kind": kind, "name": label, "columns": columns, "pattern": pattern, "sparsity": sparsity, "times": times}
        describe(row, bytes_dense, copy_gb_s)
        rows.append(row)
        print(_timing.line(f"{kind} {label} N {columns} {pattern} {sparsity}", times), flush=True)
        _timing.write(name, device, rows)

    with torch.no_grad():
        if "linear" in options.part:
            shapes = LINEAR[:2] if options.quick else LINEAR
            for (m, k), pattern, batch, sparsity in itertools.product(shapes, ("random", "vectors", "blocks"), COLUMNS, SPARSITIES):
                times = linear_case(m, k, batch, sparsity, pattern, dtype, generator, not options.no_peers)
                keep("linear", f"{m}x{k}", batch, pattern, sparsity, times, m * k * dtype.itemsize)
        if "conv" in options.part:
            layers = CONVOLUTIONS[:2] if options.quick else CONVOLUTIONS
            for layer, pattern, batch, sparsity in itertools.product(layers, ("random", "panels"), BATCHES, SPARSITIES):
                label, inputs, outputs, kernel, size = layer
                times = convolution_case(inputs, outputs, kernel, size, batch, sparsity, pattern, dtype, generator)
                keep("conv", label, batch, pattern, sparsity, times, inputs * outputs * kernel**2 * dtype.itemsize)
    for kind, pattern, columns in sorted({(r["kind"], r["pattern"], r["columns"]) for r in rows}):
        curves: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            ratios = [t["ratio"] for side, t in r["times"].items() if "ratio" in t and side.startswith(OWN)]
            if (r["kind"], r["pattern"], r["columns"]) == (kind, pattern, columns) and ratios:
                curves.setdefault(r["name"], []).append((r["sparsity"], max(ratios)))
        bound = byte_bound if pattern == "random" else lambda s: 1 / (1 - s)
        _timing.plot(_timing.RESULTS / f"{name}_{kind}_{pattern}_{columns}.png", f"{kind}, {pattern} mask, N {columns}", curves, bound)


if __name__ == "__main__":
    main()
