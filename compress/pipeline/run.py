"""A run from configuration to report: base network, one entry per method, ratio and seed, benchmark, results.

    config -> data -> model -> statistics -> scores -> allocation -> plan -> surgery -> recalibration -> fine-tuning -> report

Under torchrun every process trains; only the first one compresses, writes and reports, and hands its result to the others.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress import __version__, methods
from compress.api import ranks
from compress.config import Config
from compress.config_file import to_json
from compress.data import load_data
from compress.errors import RunError, Unreachable, cause
from compress.pipeline.bench import measure
from compress.pipeline.checks import check, pick_device
from compress.pipeline.entry import entry_name, entry_stage, plan_effect, saved_latency
from compress.pipeline.folder import Mode, RunFolder
from compress.pipeline.stages import Job, base_stage
from compress.report import write_report, write_results
from compress.train.distributed import Dist, connect
from compress.train.loop import check_training

Log = Callable[[str], None]


def run(config: Config, output_dir: Path, mode: Mode = "auto", log: Log | None = None) -> Path:
    """Carry out `config` in `output_dir / config.name` and return that folder.

    Parameters
    ----------
    mode:
        "auto" continues a run of the same configuration; "resume" does so and refuses to start one; "overwrite" starts over.
    log:
        Called with each line of progress; the default prints on the first process.

    Raises
    ------
    UserError, RunError, Terminated. Unreachable: entries whose budget of measured time this device does not allow, after the others are made and reported.
    """
    with _memory_errors(), connect(pick_device(config.device)) as dist, _torch_settings(config):
        return _run(config, output_dir, mode, log or (print_line if dist.is_main else _silent), dist)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn the ways in which torch and Python run out of memory into one `RunError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise RunError(f"The memory is not enough ({cause(error)}); lower the batch sizes or the size of the network.") from error


def _run(config: Config, output_dir: Path, mode: Mode, log: Log, dist: Dist) -> Path:
    started = time.time()
    folder = RunFolder(output_dir / config.name, to_json(config))
    if dist.is_main:
        folder.check(mode)
    prepared = check(config)
    if config.data.download and not dist.is_main:
        dist.barrier()  # the first process downloads, the others then find the files
    data = load_data(config.data, seed=config.seed, device=dist.device)
    if config.data.download and dist.is_main:
        dist.barrier()
    for section, batch_size in ((None if config.model.weights else config.train, None), (config.finetune, config.finetune.batch_size)):
        if section is not None and section.epochs:
            check_training(prepared.model, data, section, batch_size or config.data.batch_size, dist)
    job = Job(config, folder, data, prepared, dist, log)
    with folder.open(mode) if dist.is_main else contextlib.nullcontext():
        log(f"{config.name}: {data.name}, {len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images, {dist.device}")
        base = base_stage(job)
        entries, refused = [], []
        for seed, method, ratio in _entries(config):
            try:
                entries.append(entry_stage(job, base, method, ratio, seed))
            except Unreachable as error:
                refused.append(f"{entry_name(config, method, ratio, seed)}: {error}")
                log(refused[-1])
        if not dist.is_main:  # and without an error: torchrun would end the first process, which still measures and reports
            return folder.path
        rows, details = measure(job, base, entries)
        meta = {
            "toolkit": __version__, "config": to_json(config), "machine": _machine(dist.device), "data": {
                "train": len(data.train), "val": len(data.val), "test": len(data.test), "classes": data.num_classes, "shape": list(data.input_shape)},
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)), "seconds": round(time.time() - started, 1), "unreachable": refused, "details": details,
        }
        results = write_results(folder.path, rows, meta)
        page = write_report(folder.path, results)
        for row in rows:
            log(summary(row))
        log(f"report: {page}")
        _end(refused)
    return folder.path


def _end(refused: list[str]) -> None:
    """Raise `Unreachable` where entries could not be made."""
    if refused:
        raise Unreachable("\n".join(refused))


def _entries(config: Config) -> list[tuple[int, str, float]]:
    return [(seed, method, ratio) for seed in config.prune.seeds for method in config.prune.methods for ratio in config.prune.ratios]


def dry_run(config: Config, log: Log | None = None) -> list[dict[str, Any]]:
    """Log what each plan would do (widths or ranks, parameters, MACs) without training or writing; returns one row per plan.

    All rounds are gone through, without the fine-tuning between them. Statistics come from the network as it is before training, so the widths are those of the loaded weights, or of random ones.
    """
    with _memory_errors():
        return _dry_run(config, log or print_line)


def _dry_run(config: Config, log: Log) -> list[dict[str, Any]]:
    prepared = check(config)
    needed = any(methods.needs_data(name, config.prune.allocation) for name in config.prune.methods)
    # time is that of the device that the run will use; everything else is the same everywhere
    device = pick_device(config.device) if config.prune.budget == "latency" else torch.device("cpu")
    prepared = replace(prepared, model=prepared.model.to(device), example=prepared.example.to(device))
    data = load_data(config.data, seed=config.seed, device=device) if needed else None
    source = config.model.weights or "initial weights: widths of the trained network will differ"
    log(f"dry run of {config.name} ({source})")
    rows, refused = [], []
    for seed, method, ratio in _entries(config):
        try:
            row, model = plan_effect(config, prepared, data, method, ratio, seed)
        except Unreachable as error:
            refused.append(f"{entry_name(config, method, ratio, seed)}: {error}")
            log(refused[-1])
            continue
        rows.append(row)
        log(f"{entry_name(config, method, ratio, seed)}: {row['params']:,} parameters ({row['params_removed']:.1%} removed), "
            f"{row['macs']:,} MACs ({row['macs_removed']:.1%} removed)" + saved_latency(row))
        changes = [f"{name} {a}->{b}" for name, (a, b) in row["widths"].items() if a != b]
        changes += [f"{name} {'x'.join(map(str, full))}->{'x'.join(map(str, kept))}" for name, (full, kept) in ranks(model).items()]
        if changes:
            log("  " + ", ".join(changes))
    _end(refused)
    return rows


def summary(row: dict[str, Any]) -> str:
    """One line of text for a row of the results."""
    latency = row["latency_ms"] or {}
    times = ", ".join(f"{values['median']:.2f} ms at batch {batch}" for batch, values in latency.items())
    budget = f" {row['budget']} {row['ratio']:.2f}" if row["ratio"] else ""
    return (f"{row['method'] + budget:>32}: {row['params']:,} parameters, {row['gflops']:.3g} GFLOPs, "
            f"accuracy {row['accuracy']:.4f} ({row['accuracy'] - row['accuracy_base']:+.4f})" + (f", {times}" if times else ""))


def print_line(line: str) -> None:
    """Print at once, also through a pipe."""
    print(line, flush=True)


def _silent(line: str) -> None:
    pass


@contextlib.contextmanager
def _torch_settings(config: Config) -> Iterator[None]:
    """Threads and determinism of the configuration inside, the caller's own outside."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(config.threads or threads)
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor, "threads": torch.get_num_threads(),
        "python": sys.version.split()[0], "torch": torch.__version__, "platform": platform.platform(),
    }

