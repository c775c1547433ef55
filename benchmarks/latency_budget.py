"""Accuracy at equal measured time: published CIFAR-10 ResNets compressed to run 1.5 and 2 times as fast on this machine, no fine-tuning.

    python -m benchmarks.latency_budget --data CIFAR_ROOT --weights FOLDER [--networks resnet56] [--methods l1:uniform kfac_cp] [--out FILE]

Statistics, recalibration and reconstruction as in `benchmarks.one_shot`, accuracies with and without reconstruction of the same cut. A method is
written name:allocation. The budget is the time of one forward pass of `--batch` images, searched for by the method itself; afterwards the network is timed again, in turns with
the original, for `--seconds`: that is the speed-up of a row. `tp_l1` and `tp_taylor` are Torch-Pruning's criteria (global, cut in one step), whose pruning ratio is
searched for in the same way. Rows are kept as they are measured; a table is written beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.one_shot import BATCH, IMAGES, MEAN, NETWORKS, RECONSTRUCTION, STD, Ours, Rival
from compress.config import DataConfig
from compress.cost import count
from compress.data import load_data
from compress.errors import CompressError
from compress.files import write_json, write_text
from compress.latency import compare
from compress.methods.timing import Timing, search
from compress.reconstruct import reconstruct
from compress.train import evaluate, recalibrate
from models import build, load_weights

SPEEDUPS = (1.5, 2.0)
METHODS = ("l1:uniform", "l1:measured", "taylor_fo:global", "taylor_fo:measured", "kron_obs:uniform", "kron_obs:measured", "svd:global", "kfac_tucker:global", "kfac_cp:global", "tp_l1",
           "tp_taylor")


def cut(name: str, state: Any, ratio: float, clock: Timing) -> tuple[nn.Module, Any]:
    """The network that saves `ratio` of the latency by the method, before recalibration, and its plan (None for the rival)."""
    if isinstance(state, Rival):
        made = {}

        def saved(share: float) -> float:
            made[share], pruner = state._pruner(share, 1)
            pruner.step()
            return clock.saved(state.model, made[share])

        share, _ = search(ratio, 0.95, saved, name)
        return made[share], None
    result = copy.deepcopy(state.model)
    context = replace(state.context, allocation=name.partition(":")[2] or "global", timing=clock)
    return result, state.method.apply(result, context, state.state, {"latency": ratio})


def rows(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One result per network, method and speed-up, yielded as it is measured."""
    data = load_data(DataConfig(name="cifar10", root=arguments.data, mean=MEAN, std=STD, val_fraction=0.0), seed=0, device=torch.device("cpu"))
    batches, augmented = (draw(IMAGES, BATCH, torch.Generator().manual_seed(0)) for draw in (data.calibration, data.recalibration))
    example = torch.zeros(1, 3, 32, 32)
    clock = Timing(torch.randn(arguments.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)), arguments.seconds, arguments.threads)
    for network in arguments.networks:
        model = build(network, 10)
        load_weights(model, Path(arguments.weights) / f"{network}_cifar10.safetensors")
        base, states = count(model.eval(), example), {}
        for name in arguments.methods:
            for speedup in SPEEDUPS:
                row = {"network": network, "method": name, "batch": arguments.batch, "threads": arguments.threads, "target": speedup}
                if any(all(old[key] == value for key, value in row.items()) for old in known):
                    continue
                torch.manual_seed(0)
                plain = name.partition(":")[0]
                if plain not in states:
                    states[plain] = (Rival if plain.startswith("tp_") else Ours)(model, plain, batches, augmented, example)
                started = time.perf_counter()
                try:
                    small, plan = cut(name, states[plain], 1 - 1 / speedup, clock)
                except CompressError as error:
                    yield row | {"error": str(error)}
                    continue
                seconds = round(time.perf_counter() - started, 1)
                timed = compare({"original": states[plain].model if plan is None else model, "small": small}, clock.inputs, 5 * clock.seconds, clock.threads)
                cost, one = count(small, example), timed["small"]
                row |= {"speedup": one.speedup, "speedup_p10_p90": [one.speedup_p10, one.speedup_p90], "original_ms": timed["original"].latency.median_ms,
                        "macs_removed": 1 - cost.macs / base.macs, "params_removed": 1 - cost.params / base.params, "seconds": seconds}
                for key in ("accuracy",) if plan is None else ("accuracy", "accuracy_reconstructed"):
                    fitted = copy.deepcopy(small)
                    if key != "accuracy":
                        reconstruct(fitted, model, plan, batches[: RECONSTRUCTION // BATCH])
                    recalibrate(fitted, augmented)
                    row[key] = evaluate(fitted, data.test, 500)["accuracy"]
                yield row


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: per network, speed-up asked for and method the measured speed-up, MACs removed and accuracies in percent."""
    lines = ["Accuracy (%) at equal measured time; `tp_*`: Torch-Pruning, one step.", "",
             "| network | asked | method | measured (p10 - p90) | MACs removed | accuracy | reconstructed |", "|---|---|---|---|---|---|---|"]
    for row in sorted(found, key=lambda row: (row["network"], row["target"], -row.get("accuracy_reconstructed", row.get("accuracy", -1)))):
        start = f"| {row['network']} | {row['target']:g}x | `{row['method']}` | "
        if "error" in row:
            lines.append(f"{start}not reached | | | |")
            continue
        low, high = row["speedup_p10_p90"]
        fitted = f"{100 * row['accuracy_reconstructed']:.2f}" if "accuracy_reconstructed" in row else ""
        lines.append(f"{start}{row['speedup']:.2f}x ({low:.2f} - {high:.2f}) | {100 * row['macs_removed']:.1f} % | {100 * row['accuracy']:.2f} | {fitted} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing in the results file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latency_budget.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    for row in rows(arguments, list(stored["rows"])):
        stored["rows"].append(row)
        stored |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        write_json(arguments.out, stored)
        write_text(arguments.out.with_suffix(".md"), table(stored["rows"]))
        print(" ".join(f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
