"""One-shot accuracy: every method on published CIFAR-10 ResNets at fixed MAC budgets, no fine-tuning, BatchNorm recalibrated.

    python -m benchmarks.one_shot --data CIFAR_ROOT --weights FOLDER [--networks resnet56] [--methods l1 kfac_tucker] [--rivals] [--out FILE]

FOLDER holds `<network>_cifar10.safetensors`. Calibration and recalibration use the same 2,048 training images, recalibration under the augmentation
that the networks were trained with (crops of 32 out of 40, flips): without it the uncompressed networks lose three points. Channel methods are
run with all allocations: one threshold over all layers, the same fraction of each, and by measured losses; low rank by estimated and by
measured losses. With --reconstruct the layers are fitted to the original's (`compress.reconstruct`). With --rivals
Torch-Pruning 1.6.1's criteria (global ranking) are run on the same network, images, recalibration and MAC counter, in small steps and in one. Its Hessian
criterion is run as released, which keeps the squares of the last image's gradient only, and (`tp_hessian_mean`) with their mean over all images. Results are kept row by row, so that an interrupted
benchmark continues; a table is written beside them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._published import BATCH, IMAGES, NETWORKS, RESULTS, Rows, bundle, keep, known, parser, published
from compress.cost import count
from compress.errors import CompressError
from compress.graph import trace
from compress.methods import Context, method, names
from compress.methods.low_rank import RankMethod
from compress.reconstruct import reconstruct
from compress.train import evaluate, recalibrate
from models.layers import PadShortcut

SPEEDUPS = (1.5, 2.11)
RECONSTRUCTION = 1024
STEPS = 400  # of the rival's iterative pruning: fine enough to stop near the target


def channel_and_low_rank() -> list[str]:
    """Every method that takes a budget of MACs."""
    return [name for name in names() if "macs" in method(name).budgets]


def allocations(name: str) -> tuple[str, ...]:
    """How a method may share a budget; the same fraction of every layer is not for ranks from a menu."""
    known = method(name).allocations
    return tuple(way for way in known if way != "uniform") if isinstance(method(name), RankMethod) else known


class Ours:
    """One of our methods on one network; its statistics are measured once for all targets."""

    def __init__(self, model: nn.Module, name: str, batches: list[Any], augmented: list[Any], example: torch.Tensor) -> None:
        self.model, self.method, self.augmented = model, method(name), augmented
        self.context = Context(model, trace(model, example), example, batches, F.cross_entropy, torch.Generator().manual_seed(0))
        self.state = self.method.prepare(self.context)

    def at(self, target: float, allocation: str, fitted: bool = False) -> nn.Module:
        """The network compressed to at most 1/target of its MACs, `fitted` to the original's layers, recalibrated.

        A budget of channels is met to within 1 %; where the result lies above it, a little more is asked for, since the rival stops only below.
        """
        total = count(self.model, self.context.example).macs
        ratio = 1 - 1 / target
        context = replace(self.context, allocation=allocation)
        for _ in range(40):
            result = copy.deepcopy(self.model)
            plan = self.method.apply(result, context, self.state, {"macs": ratio})
            missing = count(result, self.context.example).macs / total - 1 / target
            if missing <= 0:
                break
            ratio += 1e-3
        if fitted:
            reconstruct(result, self.model, plan, self.context.batches[: RECONSTRUCTION // BATCH])
        recalibrate(result, self.augmented)
        return result


RIVALS = ("tp_l1", "tp_l2", "tp_taylor", "tp_hessian", "tp_hessian_mean")


def selecting(shortcut: PadShortcut) -> nn.Conv2d:
    """The same function as a 1x1 convolution: the rival mixes up the channels of a zero-padded shortcut and leaves a network that does not run."""
    inputs = shortcut.front + shortcut.back  # these networks double their width
    outputs = 2 * inputs
    conv = nn.Conv2d(inputs, outputs, 1, stride=shortcut.stride, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        for channel in range(inputs):
            conv.weight[shortcut.front + channel, channel] = 1
    return conv


class Rival:
    """One of Torch-Pruning's criteria (global ranking) on one network; its gradients are measured once, on the network before any cut."""

    def __init__(self, model: nn.Module, name: str, batches: list[Any], augmented: list[Any], example: torch.Tensor) -> None:
        import torch_pruning as tp

        self.importance = {
            "tp_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1), "tp_l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "tp_taylor": tp.importance.GroupTaylorImportance, "tp_hessian": tp.importance.GroupHessianImportance,
            "tp_hessian_mean": tp.importance.GroupHessianImportance,
        }[name]
        self.model, self.augmented, self.example = copy.deepcopy(model).eval(), augmented, example
        for place, module in list(self.model.named_modules()):
            if isinstance(module, PadShortcut):
                self.model.set_submodule(place, selecting(module))
        self.total = count(self.model, example).macs
        if name == "tp_taylor":
            for x, y in batches[: 1024 // BATCH]:
                F.cross_entropy(self.model(x), y).backward()
        if name.startswith("tp_hessian"):
            importance, squares_of = self.importance(), {}
            images = 256
            for x, y in (pair for batch in batches[: images // BATCH] for pair in zip(*batch, strict=True)):
                self.model.zero_grad()
                F.cross_entropy(self.model(x[None]), y[None]).backward()
                importance.accumulate_grad(self.model)
                for parameter in self.model.parameters():
                    squares_of[parameter] = squares_of.get(parameter, 0) + parameter.grad.square()
            released = name == "tp_hessian"
            for parameter, squares in (importance._accu_grad if released else squares_of).items():  # as the criterion does when it is first asked
                parameter.grad = squares / (importance._counter[parameter] if released else images)

    def _pruner(self, ratio: float, steps: int) -> tuple[nn.Module, Any]:
        import torch_pruning as tp

        result = copy.deepcopy(self.model)
        for new, old in zip(result.parameters(), self.model.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
        heads = [module for module in result.modules() if isinstance(module, nn.Linear)]
        return result, tp.pruner.BasePruner(result, self.example, importance=self.importance(), global_pruning=True, pruning_ratio=ratio,
                                            iterative_steps=steps, ignored_layers=heads)

    def at(self, target: float, way: str) -> nn.Module:
        """The network at no more than 1/target of its MACs, recalibrated: "steps" ranks anew after every small cut, "one step" cuts once."""
        if way == "steps":
            result, pruner = self._pruner(0.9, STEPS)
            for _ in range(STEPS):
                pruner.step()  # gradients are sliced along with the weights
                if self.total / count(result, self.example).macs >= target:
                    break
        else:
            low, high = 0.0, 0.95
            for _ in range(12):
                middle = (low + high) / 2
                found, pruner = self._pruner(middle, 1)
                pruner.step()
                enough = self.total / count(found, self.example).macs >= target
                low, high = (low, middle) if enough else (middle, high)
                result = found if enough or high == 0.95 else result
        recalibrate(result, self.augmented)
        return result


def rows(arguments: argparse.Namespace, held: Rows) -> Iterator[dict[str, Any]]:
    """One result per network, method and speed-up, yielded as it is measured."""
    data = bundle(arguments.data, arguments.device)
    batches, augmented = (draw(IMAGES, BATCH, torch.Generator().manual_seed(0)) for draw in (data.calibration, data.recalibration))
    example = torch.zeros(1, 3, 32, 32, device=arguments.device)
    for network in arguments.networks:
        model = published(network, arguments.weights).to(arguments.device)
        base = count(model, example)
        for name, images in (("recalibrated", augmented), ("recalibrated without augmentation", batches)):
            row = {"network": network, "method": name, "target": 1.0}
            if not known(held, row):
                same = copy.deepcopy(model)
                recalibrate(same, images)
                yield row | {"accuracy": evaluate(same, data.test, 500)["accuracy"]}
        for name in ["dense", *arguments.methods, *(RIVALS if arguments.rivals else ())]:
            mine: Ours | Rival | None = None
            ways = ("steps", "one step") if name in RIVALS else ("global",) if name == "dense" else allocations(name)
            ways = [way for way in ways if name == "dense" or name in RIVALS or way in (arguments.allocations or ways)]
            fits = (", reconstructed",) if arguments.reconstruct and name not in ("dense", *RIVALS) else ("",)
            for speedup, way, fit in product(SPEEDUPS if name != "dense" else (1.0,), ways, fits):
                row = {"network": network, "method": (name if way in ("global", "steps") else f"{name}, {way}") + fit, "target": speedup}
                if known(held, row):
                    continue
                torch.manual_seed(0)
                started = time.perf_counter()
                try:
                    if name != "dense":
                        mine = mine or (Rival if name in RIVALS else Ours)(model, name, batches, augmented, example)
                        small = mine.at(speedup, way, True) if fit else mine.at(speedup, way)
                    else:
                        small = model
                except CompressError as error:
                    yield row | {"error": str(error)}
                    continue
                seconds = time.perf_counter() - started
                cost = count(small, example)
                yield row | {"accuracy": evaluate(small, data.test, 500)["accuracy"], "macs": cost.macs, "params": cost.params,
                             "speedup_macs": base.macs / cost.macs, "params_removed": 1 - cost.params / base.params, "seconds": round(seconds, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: test accuracy in percent, a line per method, a column per network and speed-up; "-" where a method cannot reach it."""
    base = {row["network"]: row["accuracy"] for row in rows if row["method"] == "dense"}
    columns = [(network, speedup) for network in NETWORKS if network in base for speedup in SPEEDUPS]
    cells: dict[str, dict[tuple[str, float], str]] = {}
    whole = [f"{100 * row['accuracy']:.2f} for {row['network']} {row['method']}" for row in rows if row["target"] == 1 and row["method"] != "dense"]
    for row in rows:
        if row["target"] != 1:
            cells.setdefault(row["method"], {})[row["network"], row["target"]] = f"{100 * row['accuracy']:.2f}" if "accuracy" in row else "-"
    order = sorted(cells, key=lambda name: -max((float(value) for value in cells[name].values() if value != "-"), default=0.0))
    head = [f"{network} ({100 * base[network]:.2f}) {speedup:g}x" for network, speedup in columns]
    lines = ["Test accuracy (%) after compression alone, BatchNorm recalibrated; beside each network its own accuracy. `tp_*`: Torch-Pruning.", "",
             *([f"The uncompressed networks: {', '.join(whole)}.", ""] if whole else []), "| method | " + " | ".join(head) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cells[name].get(column, "") for column in columns) + " |" for name in order]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing in the results file and print the table."""
    command = parser(__doc__.splitlines()[0], threads=None)
    command.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    command.add_argument("--methods", nargs="+", default=None)
    command.add_argument("--rivals", action="store_true")
    command.add_argument("--allocations", nargs="+", default=None, choices=["global", "uniform", "measured"], help="default: all that a method has")
    command.add_argument("--reconstruct", action="store_true", help="layers fitted to the original's on 1,024 of the images before recalibration")
    command.add_argument("--device", default="cpu")
    command.add_argument("--out", type=Path, default=RESULTS / "one_shot.json")
    arguments = command.parse_args()
    arguments.methods = channel_and_low_rank() if arguments.methods is None else arguments.methods
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep(arguments.out, lambda held: rows(arguments, held), table, arguments.device)


if __name__ == "__main__":
    main()
