"""Rows of the results: every stored network is loaded from its files, counted, and timed in turns with the unpruned one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.api import widths
from compress.cost import Cost, count
from compress.effective import mask_columns, mask_report
from compress.errors import RunError
from compress.latency import compare, peak_memory
from compress.masks import Masks
from compress.masks.histograms import weight_histograms
from compress.network_file import load
from compress.pipeline.folder import digest
from compress.pipeline.stages import Base, Job

STAGE = "benchmark"


def measure(job: Job, base: Base, entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of `results.json` (the unpruned network first), and the report's details by entry name."""
    networks = {"dense": base.model}
    for entry in entries:
        networks[entry["name"]] = load(job.folder.stage(entry["name"]), copy.deepcopy(job.prepared.model)).to(job.dist.device)
    timed = _timed(job, base, entries, networks)
    dense = count(base.model, job.prepared.example.to(job.dist.device))
    first = {"method": "dense", "budget": "params", "ratio": 0.0, "seed": job.config.seed, "accuracy": base.result["accuracy"], "seconds": base.result["seconds"]}
    rows = [_row(first, dense, dense, base, timed["dense"])]
    details: dict[str, Any] = {"dense": {"history": base.result["history"], "widths": {name: [n, n] for name, n in widths(base.model).items()}}}
    for entry in entries:
        network, example = networks[entry["name"]], job.prepared.example.to(job.dist.device)
        row = _row({"budget": job.config.prune.budget, **entry}, count(network, example), dense, base, timed[entry["name"]])
        counted = mask_report(network, example)
        rows.append(row | mask_columns(network, example, counted))
        if all(before == after for before, after in entry["widths"].values()):
            entry = {**entry, "widths": None}  # ranks or masks changed instead, and a flat line of widths says nothing
        details[entry["name"]] = {key: entry[key] for key in ("widths", "ranks", "history", "pinned", "coverage", "verified") if entry.get(key)}
        if counted is not None:
            details[entry["name"]]["mask"] = counted.to_dict() | {"histograms": weight_histograms(Masks.of(network), base.model)}
    return rows, details


def _row(entry: dict[str, Any], cost: Cost, dense: Cost, base: Base, timed: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": entry["method"], "budget": entry["budget"], "ratio": entry["ratio"], "params": cost.params, "params_removed": 1 - cost.params / dense.params,
        "macs": cost.macs, "macs_removed": 1 - cost.macs / dense.macs, "gflops": cost.flops / 1e9, "accuracy_base": base.result["accuracy"],
        "accuracy_oneshot": entry.get("accuracy_oneshot", entry["accuracy"]), "accuracy": entry["accuracy"], "latency_ms": timed.get("latency_ms"),
        **({"latency_removed": entry["latency"]["saved"]} if entry.get("latency") else {}),
        "peak_memory_bytes": timed.get("peak_memory_bytes"), "activation_bytes": cost.activation_bytes, "seconds": entry["seconds"], "seed": entry["seed"],
    }


def _timed(job: Job, base: Base, entries: list[dict[str, Any]], networks: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Latency and peak memory by network name; a finished measurement of the same networks is not repeated."""
    settings = job.config.benchmark
    if not settings.enabled:
        return {name: {} for name in networks}
    key = digest(STAGE, base.key, [[entry["key"], entry.get("latency")] for entry in entries], settings.model_dump(mode="json"), job.config.threads, str(job.dist.device))
    stored = job.folder.result(STAGE, key)
    if stored is not None:
        return stored
    job.folder.begin(STAGE, key)
    job.log(f"measuring the latency of {len(networks)} networks")
    result: dict[str, dict[str, Any]] = {name: {"latency_ms": {}} for name in networks}
    for batch in dict.fromkeys((1, settings.batch_size)):
        example = _images(job, batch)
        for mode, suffix in (("eager", ""), ("graph", " graph")) if job.dist.device.type == "cuda" else (("eager", ""),):
            try:
                timed = compare(networks, example, settings.seconds, settings.threads, mode)
            except RunError as error:  # a network that cannot be captured in a CUDA graph still has its eager times
                if mode != "graph":
                    raise
                job.log(f"no CUDA graph times at batch {batch}: {error}")
                continue
            for name, one in timed.items():
                values = {"median": one.latency.median_ms, "p10": one.latency.p10_ms, "p90": one.latency.p90_ms, "runs": one.latency.runs,
                          "speedup": one.speedup, "speedup_p10": one.speedup_p10, "speedup_p90": one.speedup_p90}
                if suffix:
                    result[name]["latency_ms"][str(batch)]["graph"] = values
                else:
                    result[name]["latency_ms"][str(batch)] = values
        for name, model in networks.items():
            result[name]["peak_memory_bytes"] = peak_memory(model, example)  # the last batch size stands: the largest
    return job.folder.finish(STAGE, key, result)


def _images(job: Job, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *job.data.input_shape, generator=generator).to(job.dist.device)
