"""Accuracy at equal measured time: published CIFAR-10 ResNets compressed to run 1.5 and 2 times as fast on this machine, no fine-tuning.

    python -m benchmarks.latency_budget --data CIFAR_ROOT --weights FOLDER [--networks resnet56] [--methods l1:uniform kfac_cp] [--repeats 3] [--out FILE]

Statistics, recalibration and reconstruction as in `benchmarks.one_shot`, accuracies with and without reconstruction of the same cut. A method is
written name:allocation. The budget is the time of one forward pass of `--batch` images, searched for by the method itself; afterwards the network is timed again, in turns with
the original, for five times `--seconds`: that is the speed-up of a row. `tp_l1` and `tp_taylor` are Torch-Pruning's criteria (global, cut in one step), whose pruning ratio is
searched for in the same way. Times scatter, and with them the cuts: everything that is timed is timed anew in every repeat, and the table gives medians and ranges.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._published import BATCH, IMAGES, NETWORKS, RESULTS, Rows, bundle, keep, known, parser, published
from benchmarks.one_shot import RECONSTRUCTION, Ours, Rival
from compress.cost import count
from compress.errors import CompressError
from compress.latency import compare
from compress.methods.timing import Timing, search
from compress.reconstruct import reconstruct
from compress.train import evaluate, recalibrate

SPEEDUPS = (1.5, 2.0)
METHODS = ("l1:uniform", "l1:measured", "taylor_fo:global", "taylor_fo:measured", "kron_obs:uniform", "kron_obs:measured", "svd:global", "cp:global", "kfac_tucker:global",
           "kfac_cp:global", "tp_l1", "tp_taylor")


def cut(name: str, state: Ours | Rival, ratio: float, clock: Timing) -> tuple[nn.Module, Any]:
    """The network that saves `ratio` of the latency by the method, before recalibration, and its plan (None for the rival)."""
    if isinstance(state, Rival):
        made = {}

        def saved(share: float) -> float:
            made[share], pruner = state._pruner(share, 1)
            pruner.step()
            return clock.saved(state.model, made[share])

        share, _ = search(ratio, 0.95, saved, name)
        return made[share], None
    if hasattr(state.state, "times"):
        state.state.times.clear()  # a repeat measures layers anew
    result = copy.deepcopy(state.model)
    context = replace(state.context, allocation=name.partition(":")[2] or "global", timing=clock)
    return result, state.method.apply(result, context, state.state, {"latency": ratio})


def rows(arguments: argparse.Namespace, held: Rows) -> Iterator[dict[str, Any]]:
    """One result per network, method, repeat and speed-up, yielded as it is measured."""
    data = bundle(arguments.data)
    batches, augmented = (draw(IMAGES, BATCH, torch.Generator().manual_seed(0)) for draw in (data.calibration, data.recalibration))
    example = torch.zeros(1, 3, 32, 32)
    clock = Timing(torch.randn(arguments.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)), arguments.seconds, arguments.threads)
    for network in arguments.networks:
        model = published(network, arguments.weights)
        base, states = count(model, example), {}
        for repeat in range(arguments.repeats):
            for name in arguments.methods:
                for speedup in SPEEDUPS:
                    row = {"network": network, "method": name, "batch": arguments.batch, "threads": arguments.threads, "target": speedup, "repeat": repeat}
                    if known(held, row):
                        continue
                    plain = name.partition(":")[0]
                    if plain not in states:
                        torch.manual_seed(0)
                        states[plain] = (Rival if plain.startswith("tp_") else Ours)(model, plain, batches, augmented, example)
                    started = time.perf_counter()
                    try:
                        small, plan = cut(name, states[plain], 1 - 1 / speedup, clock)
                    except CompressError as error:
                        yield row | {"error": str(error)}
                        continue
                    seconds = round(time.perf_counter() - started, 1)
                    timed = compare({"original": states[plain].model, "small": small}, clock.inputs, 5 * clock.seconds, clock.threads)
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


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Median, and the range where there are several values."""
    if not values:
        return ""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))} - {form.format(max(values))})"


def table(found: Rows) -> str:
    """Markdown: per network, speed-up asked for and method the measured speed-up, MACs removed and accuracies in percent, median (range) of the repeats."""
    groups: dict[tuple[str, float, str], Rows] = {}
    for row in found:
        groups.setdefault((row["network"], row["target"], row["method"]), []).append(row)
    lines = ["Accuracy (%) at equal measured time, median (range) of the repeats; `tp_*`: Torch-Pruning, one step.", "",
             "| network | asked | method | repeats | measured speed-up | MACs removed (%) | accuracy | reconstructed |", "|---|---|---|---|---|---|---|---|"]
    order = sorted(groups, key=lambda key: (key[0], key[1], -statistics.median(row.get("accuracy", -1.0) for row in groups[key]), key[2]))
    for network, target, method in order:
        every = groups[network, target, method]
        reached = [row for row in every if "error" not in row]
        times = f"{len(reached)} of {len(every)} reached" if len(reached) < len(every) else str(len(every))
        part = lambda key, factor=100.0: [factor * row[key] for row in reached if key in row]  # noqa: E731
        lines.append(f"| {network} | {target:g}x | `{method}` | {times} | {spread(part('speedup', 1.0))} | {spread(part('macs_removed'), '{:.0f}')} | {spread(part('accuracy'))} | "
                     f"{spread(part('accuracy_reconstructed'))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing in the results file and print the rows."""
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    command.add_argument("--methods", nargs="+", default=list(METHODS))
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--seconds", type=float, default=1.0, help="shortest measuring time per network and comparison")
    command.add_argument("--out", type=Path, default=RESULTS / "latency_budget.json")
    arguments = command.parse_args()
    torch.set_num_threads(arguments.threads)
    keep(arguments.out, lambda held: rows(arguments, held), table)


if __name__ == "__main__":
    main()
