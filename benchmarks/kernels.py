"""Sparse Triton kernels against cuBLAS, cuDNN and the sparse products that exist, on an NVIDIA GPU.

    python -m benchmarks.kernels [--part linear conv] [--shapes 14336x4096] [--sparsities 0.5 0.9] [--minutes 9] [--retry] [--out FOLDER]

Run it from the project's folder. Every case: the dense rival works on the masked weight (zeros included); all sides are CUDA graphs of 20
launches or more that go round copies of their weights larger than three times the second-level cache, replayed in turns; medians with 10th to
90th percentile. Where even 8192 copies are smaller, the row and the table call the side partly warm or warm. A side that computes something
else than float64 within the data type's tolerance (float32: TF32's where torch's flags allow TF32), or that fails, shows no speed; torch 2:4,
which drops further weights, is held against its own product. For each side the GB/s of what it reads and writes (packed weight with its
indices, x and y) and their share of the measured copy bandwidth are stored.

Kernels and rivals that have settings are tuned alike on every case: a quick measurement of each setting, at most --tuning seconds per side
(and the setting in progress; compiling counts), so a case of four tuned sides takes about two minutes when nothing is compiled yet, and
seconds later on. The row names the fastest setting and the time of every other; the kernel's own choice is always among them.

Cases are measured in a process of their own; one that crashes is recorded as failed. kernels_<gpu>.json, its table and the case's plot with the
byte bound are written after every case. A case that the file holds of the same GPU, library versions and kernel sources, with rivals and as
much tuning, is not measured again (a failed one is with --retry); otherwise its row is replaced. --minutes ends a run: no case starts that,
going by the longest of the last five, would not end in time, and one that takes longer all the same is stopped and not recorded. The same command goes on.

Rivals: cuBLAS / cuDNN, torch CSR (cuSPARSE), torch BSR with its default and with swept settings, torch 2:4 (cuSPARSELt), blksprs where it
is installed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import _timing
from benchmarks._cases import CONVOLUTIONS, FORMATS, LINEAR, measure_case
from benchmarks._sides import describe
from benchmarks._worker import Worker
from kernels.table import device_name
from kernels.version import version

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = (1, 8, 16, 64, 512)
BATCHES = (1, 128)
OWN = ("run16", "vector_block", "two_four", "sparse_conv")
FACTS = ("kind", "name", "columns", "pattern", "sparsity")
CASE_SECONDS = 1200.0


def byte_bound(sparsity: float, itemsize: int = 2) -> float:
    """Dense bytes over run16's bytes (nibbles below 85 % sparsity, bytes above), padding left out."""
    value = 8 * itemsize
    return value / ((value + (5 if sparsity < 0.85 else 9)) * (1 - sparsity))


def kernels_of(facts: dict[str, Any]) -> str:
    """The version of the kernels that a case runs through."""
    return version(*FORMATS[facts["kind"], facts["pattern"]])


def done(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row of this machine is what the options ask for: of today's kernels, with rivals, with as much tuning."""
    if options.retry and ("failed" in row or "rivals_failed" in row):
        return False
    rivals = options.no_peers or row.get("peers", False)
    return row.get("kernels") == kernels_of(row) and rivals and row.get("tuning", 0) >= options.tuning


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


def replaced(rows: list[dict], row: dict[str, Any]) -> list[dict]:
    """The rows with `row` in the place of the same case's on the same machine. A case that failed when rivals were added to it keeps what
    was measured without them."""
    def key(r: dict) -> tuple:
        return r["machine"], *(r[fact] for fact in FACTS)

    earlier = next((r for r in rows if key(r) == key(row)), {})
    if "failed" in row and earlier.get("times") and earlier.get("kernels") == row["kernels"]:
        row = earlier | {"peers": row["peers"], "tuning": row["tuning"], "rivals_failed": row["failed"]}
    return [r for r in rows if key(r) != key(row)] + [row]


def plot(rows: list[dict], kind: str, pattern: str, columns: int, path: Path, itemsize: int) -> None:
    """Ratio against sparsity of one kind, pattern and number of columns, a curve for every layer: the fastest of this project's forms."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        ratios = [t["ratio"] for side, t in r["times"].items() if "ratio" in t and side.startswith(OWN) and not side.endswith("full list")]
        if (r["kind"], r["pattern"], r["columns"]) == (kind, pattern, columns) and ratios:
            curves.setdefault(r["name"], []).append((r["sparsity"], max(ratios)))
    if curves:
        def bound(sparsity: float) -> float:
            return byte_bound(sparsity, itemsize) if pattern == "random" and kind == "linear" else 1 / (1 - sparsity)

        _timing.plot(path, f"{kind}, {pattern} mask, N {columns}", curves, bound)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["linear", "conv"], choices=["linear", "conv"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=[], help="names of layers, such as 14336x4096 or 'resnet50 3x3 14'; all where none is given")
    parser.add_argument("--columns", nargs="+", type=int, default=list(COLUMNS), help="columns of x of the matrix products")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--no-peers", action="store_true", help="only dense and this project's kernels; rivals are added by a run without it")
    parser.add_argument("--tuning", type=float, default=30.0, help="seconds for the settings of one side; 0: every side's own choice")
    parser.add_argument("--retry", action="store_true", help="measure cases again that failed before")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--out", type=Path, default=_timing.RESULTS, help="folder of the results")
    return parser.parse_args(given)


def run(options: argparse.Namespace, worker: Worker, device: torch.device, name: str, started: float) -> list[dict]:
    """Measures the cases that are missing until the time is up; writes rows, table and plots after each. Returns all rows."""
    copy_gb_s = _timing.copy_bandwidth(device)
    # A gibibyte and its copy, which the worker may need.
    torch.cuda.empty_cache()
    machine, end = device_name(device), started + 60 * options.minutes
    recent: deque[float] = deque(maxlen=5)
    rows = _timing.read(name, options.out)
    known = {tuple(row[key] for key in FACTS) for row in _timing.of_machine(rows, device) if done(row, options)}
    for facts in cases(options, known):
        begun = time.monotonic()
        if begun + max(recent, default=0.0) >= end:
            print(f"stopped before {options.minutes:g} minutes were over; the same command goes on", flush=True)
            break
        job = {"dtype": options.dtype, "peers": not options.no_peers, "tuning": options.tuning, "device": device.type}
        worker.seconds = min(CASE_SECONDS, end - begun)
        times = worker.run(facts | job)
        if time.monotonic() >= end and "failed" in times:
            print(f"stopped after {options.minutes:g} minutes, in the middle of a case; the same command goes on", flush=True)
            break
        recent.append(time.monotonic() - begun)
        failed = {"failed": times["failed"]} if "failed" in times else {}
        times = {} if failed else times
        describe(times, copy_gb_s)
        row = {"machine": machine, **facts, "kernels": kernels_of(facts), "peers": job["peers"] or facts["kind"] == "conv",
               "tuning": options.tuning, **failed, "times": times}
        rows = replaced(rows, row)
        print(_timing.line(" ".join(map(str, facts.values())), times or failed), flush=True)
        _timing.write(name, device, [_dated(row) for row in rows], options.out)
        today = [row for row in _timing.of_machine(rows, device) if row.get("kernels") == kernels_of(row)]
        drawn = facts["kind"], facts["pattern"], facts["columns"]
        path = options.out / f"{'_'.join(map(str, (name, *drawn)))}.png"
        plot(today, *drawn, path, getattr(torch, options.dtype).itemsize)
    return rows


def _dated(row: dict[str, Any]) -> dict[str, Any]:
    """The row, marked where the kernels have changed since it was measured."""
    kept = {key: value for key, value in row.items() if key != "outdated"}
    return kept if row.get("kernels") == kernels_of(row) else kept | {"outdated": True}


def main() -> None:
    options, started = arguments(), time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs an NVIDIA GPU and none was found; benchmarks.kernels_cpu measures the CPU path")
    device = torch.device("cuda")
    suffix = "" if options.dtype == "bfloat16" else f"_{options.dtype}"
    name = "kernels_" + re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower() + suffix
    worker = Worker(measure_case, CASE_SECONDS)
    try:
        run(options, worker, device, name, started)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
