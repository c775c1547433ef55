"""Rows and details of a run as it might be, drawn from a generator: several methods, ratios and seeds on a residual network."""

from __future__ import annotations

import random
from typing import Any

from compress.report import entry_name

PARAMS, MACS = 269_034, 5_063_968


def layers(blocks: int = 3) -> dict[str, int]:
    """Widths of a CIFAR residual network with 6 * blocks + 2 layers."""
    inner = {f"layer{stage}.{block}.conv{conv}": 8 * 2**stage for stage in (1, 2, 3) for block in range(blocks) for conv in (1, 2)}
    return {"conv1": 16, **inner}


def history(rng: random.Random, epochs: int, start: float, end: float) -> list[dict[str, Any]]:
    """Epochs whose accuracy approaches `end`."""
    result = []
    for epoch in range(1, epochs + 1):
        accuracy = end - (end - start) * 0.6**epoch + rng.gauss(0, 0.003)
        result.append(
            {
                "epoch": epoch,
                "lr": 0.1 * (1 - epoch / (epochs + 1)),
                "train_loss": 2.5 * (1 - accuracy) + 0.02,
                "train_accuracy": min(1.0, accuracy + 0.012),
                "val_loss": 3 * (1 - accuracy) + 0.03,
                "val_accuracy": min(1.0, accuracy),
                "seconds": 1.5,
            }
        )
    return result


def latency(rng: random.Random, milliseconds: float) -> dict[str, float]:
    """Median and spread around `milliseconds`."""
    median = milliseconds * rng.uniform(0.97, 1.03)
    return {"median": median, "p10": median * rng.uniform(0.93, 0.98), "p90": median * rng.uniform(1.03, 1.12)}


def example(
    methods: tuple[str, ...] = ("l1", "taylor_fo", "random"),
    ratios: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9),
    seeds: tuple[int, ...] = (0,),
    blocks: int = 3,
    budget: str = "macs",
    timed: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, meta) as a run hands them over; methods named `mask_*` give masked rows, `svd` and `tucker` ranks instead of widths."""
    rng = random.Random(1)
    base = 0.9733
    rows = [
        {
            "method": "dense",
            "budget": "params",
            "ratio": 0,
            "params": PARAMS,
            "params_removed": 0.0,
            "macs": MACS,
            "macs_removed": 0.0,
            "gflops": 2e-9 * MACS,
            "accuracy_base": base,
            "accuracy_oneshot": base,
            "accuracy": base,
            "latency_ms": {"1": latency(rng, 2.1), "64": latency(rng, 11.8)} if timed else None,
            "seconds": 41.0,
            "seed": 0,
        }
    ]
    details: dict[str, Any] = {"dense": {"history": history(rng, 20, 0.1, base)}}
    for index, method in enumerate(methods):
        for ratio in ratios:
            for seed in seeds:
                masked = method.startswith("mask_")
                removed = 0.0 if masked else ratio + rng.uniform(-0.004, 0.004)
                params_removed = 0.0 if masked else min(0.99, ratio * rng.uniform(0.9, 1.05))
                accuracy = base - (0.02 + 0.012 * index) * ratio**3 * 4 + rng.gauss(0, 0.002)
                oneshot = max(0.1, base - (0.25 + 0.1 * index) * ratio * 1.7)
                row = {
                    "method": method,
                    "budget": "weights" if masked else budget,
                    "ratio": ratio,
                    "params": round(PARAMS * (1 - params_removed)),
                    "params_removed": params_removed,
                    "macs": round(MACS * (1 - removed)),
                    "macs_removed": removed,
                    "gflops": 2e-9 * MACS * (1 - removed),
                    "accuracy_base": base,
                    "accuracy_oneshot": oneshot,
                    "accuracy": accuracy,
                    "latency_ms": {"1": latency(rng, 2.2 - 0.9 * removed), "64": latency(rng, 11.8 * (1 - 0.8 * removed))}
                    if timed
                    else None,
                    "seconds": rng.uniform(8, 14),
                    "seed": seed,
                }
                if masked:
                    row |= {"density": 1 - ratio, "macs_nonzero": round(MACS * (1 - ratio * 0.95))}
                rows.append(row)
                details[entry_name(row)] = detail(rng, method, ratio, blocks, history(rng, 8, oneshot, accuracy))
    meta = {
        "toolkit": "0.1.0",
        "started": "2025-03-04 10:11:12",
        "seconds": 167.2,
        "machine": {"device": "Example CPU 3000", "threads": 2, "python": "3.12.3", "torch": "2.11.0"},
        "data": {"train": 1294, "val": 143, "test": 360, "classes": 10, "shape": [1, 8, 8]},
        "config": {
            "name": "digits-resnet20",
            "data": {"name": "digits"},
            "model": {"name": "resnet20", "options": {}},
            "prune": {"methods": list(methods), "ratios": list(ratios)},
        },
        "details": details,
    }
    return rows, meta


def detail(rng: random.Random, method: str, ratio: float, blocks: int, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Details of one network."""
    result: dict[str, Any] = {"history": epochs, "verified": {"max_relative_difference": 3.1e-7, "batch": 2}}
    if method.startswith("mask_"):
        return result | {"mask": mask(rng, ratio, blocks)}
    kept = {
        name: max(1, round(width * min(1.0, max(0.05, (1 - ratio) ** 0.5 * rng.uniform(0.5, 1.4)))))
        for name, width in layers(blocks).items()
    }
    if method == "tucker":
        result["ranks"] = {name: [[width, width], [kept[name], max(1, kept[name] - 2)]] for name, width in layers(blocks).items()}
    elif method == "svd":
        result["ranks"] = {name: [width, kept[name]] for name, width in layers(blocks).items()}
    else:
        result["widths"] = {name: [width, kept[name]] for name, width in layers(blocks).items()}
    result["pinned"] = {
        "conv1.weight": "input of the network",
        "linear.weight": "output of the network",
        "linear.bias": "output of the network",
    }
    result["coverage"] = [{"layer": name, "status": "pruned", "reason": ""} for name in layers(blocks)] + [
        {"layer": "linear", "status": "pinned", "reason": "output of the network"}
    ]
    return result


def mask(rng: random.Random, ratio: float, blocks: int) -> dict[str, Any]:
    """Counts and histograms of a masked network: at ratios above 0.8 the last layer is empty, and part of the others has no effect."""
    found, histograms = [], {}
    for index, (name, width) in enumerate(sizes := list(layers(blocks).items())):
        weights = 9 * width * width
        kept = 0 if ratio > 0.8 and index == len(sizes) - 1 else max(1, round(weights * (1 - ratio) * rng.uniform(0.5, 1.4)))
        effective = kept if ratio <= 0.8 else kept // 2
        cost = 64 * weights
        found.append({
            "name": f"{name}.weight", "shape": [width, width, 3, 3], "weights": weights, "kept": kept, "effective": effective,
            "density": kept / weights, "macs": cost, "macs_nonzero": cost * kept / weights, "channels": width,
            "dead_channels": 0 if kept else width,
        })  # fmt: skip
        before, after = [1, 4, 9, 4, 1], [kept // 2, 0, 0, 0, kept - kept // 2]
        histograms[f"{name}.weight"] = {"low": -0.5, "high": 0.5, "before": before, "after": after}
    sums = {key: sum(layer[key] for layer in found) for key in ("weights", "kept", "effective", "macs", "macs_nonzero", "dead_channels")}
    return sums | {
        "density": sums["kept"] / sums["weights"], "effective_density": sums["effective"] / sums["weights"],
        "compression_ratio": sums["weights"] / sums["kept"], "effective_compression_ratio": sums["weights"] / sums["effective"],
        "empty_layers": [layer["name"] for layer in found if not layer["kept"]], "layers": found, "histograms": histograms,
    }  # fmt: skip
