"""Sparse forms of masked layers against dense on this CPU, float32, single thread unless --threads says otherwise.

    python -m benchmarks.kernels_cpu [--seconds 1.0] [--batches 1 128] [--quick] [--redraw]

Run it from the project's folder. Rivals in the same run, interleaved: torch's dense product or convolution on the masked weight, MKL CSR
through torch, scipy CSR, and the compiled
CSR kernel. A form whose result is wrong shows no speed. Writes results/kernels_cpu.json and one plot per group of layers; the byte bound in
them is what one could gain by reading less: bytes of the dense weight over those of CSR. It binds where weights come from memory (few columns,
large layers) and says nothing where the multiply-adds take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import _timing
from kernels import SparseConv2d, SparseLinear
from kernels.csr.op import ENGINES

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
LINEAR = [(2048, 2048), (3072, 768), (1000, 2048), (4096, 4096)]
COLUMNS = (1, 8, 16, 64, 512)
# name, in channels, out channels, kernel, stride, map
CONVOLUTIONS = [
    ("resnet50 3x3 56", 64, 64, 3, 1, 56),
    ("resnet50 3x3 28", 128, 128, 3, 1, 28),
    ("resnet50 3x3 14", 256, 256, 3, 1, 14),
    ("resnet50 3x3 7", 512, 512, 3, 1, 7),
    ("resnet50 3x3/2 56", 128, 128, 3, 2, 56),
    ("resnet50 1x1 56", 256, 64, 1, 1, 56),
    ("resnet50 1x1 14", 1024, 256, 1, 1, 14),
    ("resnet50 1x1 7", 512, 2048, 1, 1, 7),
    ("vgg16 3x3 28", 512, 512, 3, 1, 28),
    ("vgg16 3x3 14", 512, 512, 3, 1, 14),
    ("cifar 3x3 32", 16, 16, 3, 1, 32),
    ("cifar 3x3 8", 64, 64, 3, 1, 8),
]


def mask_randomly(layer: nn.Module, sparsity: float, generator: torch.Generator) -> None:
    """Zeroes that fraction of the weights at random places."""
    layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) >= sparsity


def case(layer: nn.Module, x: Tensor, expected: Callable[[], Tensor], seconds: float) -> dict[str, dict]:
    """Times of the dense layer and of its sparse forms on x."""
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    forms = {f"csr {engine}": kind.from_dense(layer, format="csr", engine=engine) for engine in ENGINES}
    calls = {"dense": lambda: layer(x), **{name: (lambda module=module: module(x)) for name, module in forms.items()}}
    return _timing.compare(calls, expected(), seconds)


def linear_rows(seconds: float, quick: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for outputs, inputs in LINEAR[:2] if quick else LINEAR:
        for columns in COLUMNS[:3] if quick else COLUMNS:
            for sparsity in SPARSITIES:
                layer = nn.Linear(inputs, outputs)
                mask_randomly(layer, sparsity, generator)
                x = torch.randn(columns, inputs, generator=generator)
                result = case(layer, x, lambda: F.linear(x.double(), layer.weight.double(), layer.bias.double()), seconds)
                rows.append({"kind": "linear", "name": f"{outputs}x{inputs}", "columns": columns, "sparsity": sparsity, "times": result})
                print(_timing.line(f"linear {outputs}x{inputs} N {columns} sparsity {sparsity}", result), flush=True)
    return rows


def convolution_rows(seconds: float, batches: tuple[int, ...], quick: bool, most_macs: float) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for name, inputs, outputs, kernel, stride, size in CONVOLUTIONS[::4] if quick else CONVOLUTIONS:
        for batch in batches:
            if batch * inputs * outputs * kernel**2 * (size // stride) ** 2 > most_macs:
                print(f"conv {name} batch {batch}: left out, too many multiply-accumulates for one core (--most-macs)")
                continue
            for sparsity in SPARSITIES:
                layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
                mask_randomly(layer, sparsity, generator)
                x = torch.randn(batch, inputs, size, size, generator=generator)
                exact = layer.double()
                expected = exact(x.double())
                result = case(layer.float(), x, lambda: expected, seconds)
                rows.append({"kind": "conv", "name": name, "columns": batch, "sparsity": sparsity, "times": result})
                print(_timing.line(f"conv {name} batch {batch} sparsity {sparsity}", result), flush=True)
    return rows


def byte_bound(sparsity: float) -> float:
    """Bytes of a dense float32 weight over those of CSR, which stores a 16-bit column with every kept weight; row pointers left out."""
    return 4 / ((4 + 2) * (1 - sparsity))


def plots(rows: list[dict], folder: Path = _timing.RESULTS) -> None:
    """One picture per kind and batch: the ratio of the fastest sparse form for every layer, and the byte bound."""
    for kind in ("linear", "conv"):
        for columns in sorted({r["columns"] for r in rows if r["kind"] == kind}):
            curves: dict[str, list[tuple[float, float]]] = {}
            for r in rows:
                if r["kind"] == kind and r["columns"] == columns:
                    best = max((t["ratio"] for n, t in r["times"].items() if "ratio" in t and n != "dense"), default=None)
                    if best is not None:
                        curves.setdefault(r["name"], []).append((r["sparsity"], best))
            title = f"{kind}, {'N' if kind == 'linear' else 'batch'} {columns}: fastest sparse form, CPU float32"
            _timing.plot(folder / f"kernels_cpu_{kind}_{columns}.png", title, curves, byte_bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128], help="batch sizes of the convolutions")
    parser.add_argument("--most-macs", type=float, default=4e9, help="leave out convolutions with more multiply-accumulates")
    parser.add_argument("--quick", action="store_true", help="a few layers only")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the plots from the results that are there")
    options = parser.parse_args()
    if options.redraw:
        plots(_timing.read("kernels_cpu"))
        return
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        rows = linear_rows(options.seconds, options.quick) + convolution_rows(options.seconds, tuple(options.batches), options.quick,
                                                                              options.most_macs)
    print(_timing.write("kernels_cpu", torch.device("cpu"), rows))
    plots(rows)


if __name__ == "__main__":
    main()
