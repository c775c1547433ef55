"""What collecting curvature statistics costs, against a plain forward and backward pass over the same images in the same run.

    python benchmarks/curvature_cost.py [--networks resnet56 resnet50] [--batch 32] [--batches 4] [--repeats 5] [--device cpu]
                                        [--threads 1] [--positions 64] [--ekfac] [--memory]

One label sample per image, the EKFAC pass apart. Variants: channel-only factors, full patch factors exact, and with sampled positions
(`--positions`). The rival (`loss.backward()` of the mean cross-entropy in evaluation mode, gradients dropped afterwards) and all
variants take turns within each repeat; reported are the medians of the ratios within a repeat, and their smallest and largest. What is
done once per pass whatever the number of images (allocating and finishing the factors) is included. Goals: channel 2x, full 4x, sampled
2.5x, and under 1 GB above the network's own peak at batch 128 on resnet32x4 (`--memory`; also measured with EKFAC, which holds the eigenvectors beside the
factors: that is under 1 GB with channel factors only).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from compress.curvature import collect, ekfac
from compress.siblings import own

NETWORKS = {"resnet56": ("resnet56", 10, 32), "resnet50": ("torchvision/resnet50", 1000, 224), "resnet32x4": ("resnet32x4", 100, 32)}
GOALS = {"channel": 2.0, "full": 4.0, "sampled": 2.5}
RESULTS = Path(__file__).parent / "results" / "curvature_cost.json"


def build(name: str, device: str) -> tuple[nn.Module, int, int]:
    registered, classes, size = NETWORKS[name]
    torch.manual_seed(0)
    return own("models").build(registered, classes).to(device).eval(), classes, size


def plain(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A forward and backward pass over all images."""
    for x, y in batches:
        functional.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, batch: int, number: int, repeats: int, positions: int, device: str, with_ekfac: bool) -> dict[str, object]:
    """Times and ratios of one network."""
    model, classes, size = build(name, device)
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            torch.randn(batch, 3, size, size, generator=generator).to(device),
            torch.randint(classes, (batch,), generator=generator).to(device),
        )
        for _ in range(number)
    ]
    works = {
        "plain": lambda: plain(model, data),
        "channel": lambda: collect(model, data, patch="channel"),
        "full": lambda: collect(model, data),
        "sampled": lambda: collect(model, data, positions=positions),
    }
    if with_ekfac:
        factors = collect(model, data, patch="channel")
        works["ekfac_channel_pass"] = lambda: ekfac(model, data, factors)
    for work in works.values():
        work()
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            times[key].append(seconds(work, device))
    row: dict[str, object] = {
        "network": name,
        "input": [batch, 3, size, size],
        "batches": number,
        "repeats": repeats,
        "positions": positions,
        "plain_seconds": statistics.median(times["plain"]),
    }
    for key in list(works)[1:]:
        ratios = [value / base for value, base in zip(times[key], times["plain"], strict=True)]
        row[key] = {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
            "goal": GOALS.get(key),
        }
    return row


def peak(name: str, kind: str, batch: int) -> int:
    """Peak resident memory in bytes of a fresh process that runs one pass."""
    code = f"import torch; torch.set_num_threads(1); from benchmarks.curvature_cost import one_pass; one_pass({name!r}, {kind!r}, {batch})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(out.stdout.split()[-1])


def one_pass(name: str, kind: str, batch: int) -> None:
    """Runs the plain pass or a statistics pass and prints the peak resident memory in bytes."""
    model, classes, size = build(name, "cpu")
    x = torch.randn(batch, 3, size, size)
    plain(model, [(x, torch.randint(classes, (batch,)))])
    if kind != "plain":
        collect(model, [x], patch=kind.removesuffix("_ekfac"), ekfac=kind.endswith("_ekfac"))
    # not ru_maxrss, which a new process inherits from the one that starts it
    print(next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))


def memory(name: str, batch: int) -> dict[str, object]:
    """Peak memory of the statistics pass beyond the plain pass's, factors included."""
    base = peak(name, "plain", batch)
    return {
        "network": name,
        "batch": batch,
        "plain_peak_bytes": base,
        **{f"{kind}_beyond_plain_bytes": peak(name, kind, batch) - base for kind in ("channel", "full", "channel_ekfac", "full_ekfac")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet56", "resnet50"], choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4, help="batches per pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ekfac", action="store_true", help="also time the EKFAC pass")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory on resnet32x4 at batch 128")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "processor": platform.processor() or platform.machine(),
    }
    if args.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    rows = []
    for name in args.networks:
        rows.append(measure(name, args.batch, args.batches, args.repeats, args.positions, args.device, args.ekfac))
        print(json.dumps(rows[-1]), flush=True)
    report: dict[str, object] = {"machine": machine, "device": args.device, "rows": rows}
    if args.memory:
        report["memory"] = memory("resnet32x4", 128)
        print(json.dumps(report["memory"]))
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
