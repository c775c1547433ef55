"""The pruning game on trained networks: train, stabilise, prune step by step, fine-tune.

    python -m compress.experiments.nim --config_path configs/nim/<name>.json
    python -m compress.experiments.nim --arch VGG16 --dataset cifar10 --load_name WEIGHTS --prune --prune_method L1+RANDOM

The document's own flags are kept (`--arch`, `--dataset`, `--load_name`, `--prune_method`, `--prune_speed`, `--nim_stride_size`, ...).
Sparsities are fractions throughout; the published lists are percentages of single layers, averaged without weights, and stop at 0.9
percent.

One run per architecture, data set, method and seed:
1. stabilise: `stabilise_epochs` at prune_lr; 2. for i = 1..steps: play to sparsity i * prune_speed, train 1 epoch at prune_lr / 10;
3. fine-tune `finetune_epochs` at prune_lr / 100. The optimizer starts anew in every phase. The result is the list
[(sparsity, accuracy), ...]: the loaded network, each stabilising epoch, each prune step, each fine-tuning epoch. Accuracies are
measured, never carried over from an earlier epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from compress.config import TrainConfig
from compress.data import DataBundle
from compress.errors import UserError
from compress.experiments import plots
from compress.experiments.base import Log, RunFolder, accuracy, base_model, data_of, main_guard, say
from compress.experiments.settings import Experiment, common_arguments, load_settings, one_of, validate
from compress.masks import Masks
from compress.nim import METHODS, NimGame, players_of
from compress.nim.players import ALIASES
from compress.nim.game import ORDERS, append_moves
from compress.train import fit

ARCHITECTURES = {"VGG16": "vgg16", "RESNET50": "resnet50", "DPN92": "dpn92"}


class NimConfig(Experiment):
    """Settings of the pruning game."""

    scope: str = Field("conv", pattern="^(conv|conv\\+linear)$", description="heaps: convolutions, or linear layers too")
    architectures: list[str] = Field(["VGG16"], min_length=1, description="VGG16, RESNET50, DPN92, or `model` for model.name")
    datasets: list[str] = Field(["cifar10"], min_length=1, description="data sets, each replaces data.name")
    weights: dict[str, Path] = Field(
        default_factory=dict, description="trained weights by `<architecture><dataset>`; others are trained first"
    )
    methods: list[str] = Field(list(METHODS), min_length=1, description=f"line-ups of players: {', '.join(METHODS)}")
    target_sparsity: float = Field(0.95, gt=0, lt=1, description="sparsity of the last step; int(target / speed) steps are played")
    prune_speed: float = Field(0.05, gt=0, lt=1, description="sparsity added by every step")
    stride: float = Field(0.001, gt=0, description="a move's share of the heap (below 1), or its number of weights")
    order: str = Field("random", description=f"order of play: {', '.join(ORDERS)}")
    exact: bool = Field(False, description="cut the last move of a step so that its target is met exactly")
    prune_lr: float = Field(
        0.1, gt=0, description="learning rate of the stabilising epochs; a tenth while pruning, a hundredth while fine-tuning"
    )
    stabilise_epochs: int = Field(2, ge=0, description="epochs before the first step")
    step_epochs: int = Field(1, ge=0, description="epochs after every step")
    finetune_epochs: int = Field(10, ge=0, description="epochs after the last step")
    steps_per_epoch: int | None = Field(None, ge=1, description="cap on the optimizer steps of an epoch; null: none")
    log_moves: bool = Field(False, description="write every move to moves/<run>.jsonl")
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig(epochs=500, lr=0.1, schedule="constant", nesterov=False),
        description="training of the unpruned network",
    )

    @field_validator("order")
    @classmethod
    def _order(cls, value: str) -> str:
        return one_of(value, list(ORDERS), "order of play")

    @field_validator("stride")
    @classmethod
    def _stride(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"a stride of 1 or more is a number of weights, got {value:g}")
        return value


def steps_of(settings: NimConfig) -> int:
    """Number of prune steps: the published settings 0.95 and 0.05 give 18, since 0.95 / 0.05 is just below 19 in floating point."""
    return int(settings.target_sparsity / settings.prune_speed)


def play_and_train(
    settings: NimConfig, model: torch.nn.Module, data: DataBundle, method: str, seed: int, log: Log, moves: Path | None
) -> dict[str, Any]:
    """One run; returns the published list and what happened in each step."""
    masks = Masks.attach(model, settings.scope, settings.exclude)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    stride = int(settings.stride) if settings.stride >= 1 else settings.stride
    game = NimGame(sizes, players_of(method), stride, settings.order, seed, {name: mask.cpu().numpy() for name, mask in masks.items()})
    result: list[tuple[float, float]] = [(1 - masks.density, accuracy(model, data, settings))]
    played: list[dict[str, Any]] = []

    def epochs(count: int, rate: float) -> None:
        for _ in range(count):
            cfg = settings.train.model_copy(update={"epochs": 1, "lr": rate, "schedule": "constant", "warmup_epochs": 0.0})
            fit(
                model,
                data,
                cfg,
                batch_size=settings.data.batch_size,
                seed=1000 * seed + len(result),
                steps=settings.steps_per_epoch,
                log=log,
            )
            result.append((1 - masks.density, accuracy(model, data, settings)))

    epochs(settings.stabilise_epochs, settings.prune_lr)
    for step in range(1, steps_of(settings) + 1):
        values = {name: masks.parameter(name).detach().cpu().numpy() for name in masks.names}
        play = game.play(values, step * settings.prune_speed, settings.exact)
        masks.update(
            {name: torch.from_numpy(alive).reshape(masks[name].shape).to(masks[name].device) for name, alive in game.alive.items()}
        )
        if moves is not None:
            append_moves(moves, play.moves)
        removed: dict[str, int] = {}
        for move in play.moves:
            removed[move.player] = removed.get(move.player, 0) + move.removed
        played.append({"step": step, "sparsity": play.sparsity, "moves": len(play.moves), "removed": removed, "exhausted": play.exhausted})
        played[-1]["accuracy_pruned"] = accuracy(model, data, settings)
        if play.exhausted:
            log(f"{method}: no player could move on at sparsity {play.sparsity:.4f}; the target was {step * settings.prune_speed:.4f}")
        if settings.step_epochs:
            epochs(settings.step_epochs, settings.prune_lr / 10)
        else:
            result.append((1 - masks.density, played[-1]["accuracy_pruned"]))
    epochs(settings.finetune_epochs, settings.prune_lr / 100)
    return {"list": result, "steps": played, "layer_density": masks.layer_density()}


def run(settings: NimConfig, folder: RunFolder, log: Log = say) -> list[dict[str, Any]]:
    """All runs of the settings, with results and figures; returns one row per run."""
    for method in settings.methods:
        players_of(method, log)
    methods = list(dict.fromkeys(ALIASES.get(method, method) for method in settings.methods))
    if steps_of(settings) < 1:
        raise UserError(
            f"target_sparsity {settings.target_sparsity} is below prune_speed {settings.prune_speed}: there is no step to play."
        )
    rows = []
    for arch in settings.architectures:
        for dataset in settings.datasets:
            own_settings = _for(settings, arch, dataset)
            for seed in settings.seeds:
                data = data_of(own_settings, seed)
                for method in methods:
                    key = f"{arch}-{dataset}-{method}-s{seed}"

                    def once(
                        key: str = key, method: str = method, data: DataBundle = data, seed: int = seed, own: NimConfig = own_settings
                    ) -> dict:
                        moves = folder.path / "moves" / f"{key}.jsonl" if own.log_moves else None
                        if moves is not None:
                            moves.parent.mkdir(parents=True, exist_ok=True)
                            moves.unlink(missing_ok=True)
                        return play_and_train(own, base_model(own, data, seed, folder, log), data, method, seed, log, moves)

                    found = folder.run(key, once, log)
                    first, last = found["list"][0], found["list"][-1]
                    row = {"architecture": arch, "dataset": dataset, "method": method, "seed": seed}
                    rows.append(row | {"accuracy_base": first[1], "sparsity": last[0], "accuracy": last[1]} | found)
    folder.write_rows(rows)
    figures(settings, folder, rows)
    return rows


def _for(settings: NimConfig, arch: str, dataset: str) -> NimConfig:
    if arch != "model" and arch not in ARCHITECTURES:
        raise UserError(f"Unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}, model.")
    raw = settings.model_dump(mode="json", by_alias=True)
    raw["data"]["name"] = dataset
    if arch != "model":
        raw["model"] |= {"name": ARCHITECTURES[arch], "options": {}}
    if arch + dataset in settings.weights:
        raw["model"]["weights"] = str(settings.weights[arch + dataset])
    return validate(NimConfig, raw)


def figures(settings: NimConfig, folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    """Accuracy by epoch, and first against last epoch, for each architecture and data set; a Markdown table of both."""
    first = 1 + settings.stabilise_epochs
    lines = [
        "| architecture | data set | method | seed | sparsity | after the first step | after the last epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch, dataset in dict.fromkeys((row["architecture"], row["dataset"]) for row in rows):
        found = [row for row in rows if (row["architecture"], row["dataset"]) == (arch, dataset)]
        series = {f"{row['method']} s{row['seed']}": [(k, point[1]) for k, point in enumerate(row["list"]) if k >= first] for row in found}
        plots.lines(folder.path / "figures" / f"{arch}-{dataset}", series, f"{arch} on {dataset}", "epoch", "accuracy")
        ends = {name: [points[0], points[-1]] for name, points in series.items()}
        plots.lines(
            folder.path / "figures" / f"{arch}-{dataset}-ends", ends, f"{arch} on {dataset}, first and last epoch", "epoch", "accuracy"
        )
        for row in found:
            numbers = " | ".join(f"{value:.4f}" for value in (row["sparsity"], row["list"][first][1], row["accuracy"]))
            lines.append(f"| {arch} | {dataset} | {row['method']} | {row['seed']} | {numbers} |")
    (folder.path / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def arguments() -> argparse.ArgumentParser:
    """The command line: the common options and the document's own flags."""
    parser = argparse.ArgumentParser(prog="python -m compress.experiments.nim", description=__doc__.split("\n")[0])
    common_arguments(parser)
    parser.add_argument("--log_interval", type=int, help="accepted; progress is logged once per epoch")
    parser.add_argument("--load_name", type=Path, help="trained weights (safetensors)")
    parser.add_argument("--save_name", help="name of the run folder")
    parser.add_argument("--cuda", action="store_true", help="use the GPU (the default where there is one)")
    parser.add_argument("--dataset", choices=["digits", "cifar10", "cifar100", "imagenet"], help="imagenet: a folder of images in data.root")
    parser.add_argument("--arch", choices=[*ARCHITECTURES, "model"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--epochs", type=int, help="epochs of the unpruned network")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--weight_decay", type=float)
    parser.add_argument("--train", action="store_true", help="train the unpruned network (done anyway where no weights are given)")
    parser.add_argument("--eval", action="store_true", help="only measure the unpruned network's accuracy")
    parser.add_argument("--prune", action="store_true", help="play the game (the default)")
    parser.add_argument("--prune_method", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--prune_learning_rate", type=float)
    parser.add_argument("--target_sparsity", "--target_sparcity", type=float, help="a fraction")
    parser.add_argument("--prune_speed", type=float, help="sparsity added per step, a fraction")
    parser.add_argument("--nim_stride_size", type=float)
    return parser


def settings_of(args: argparse.Namespace) -> NimConfig:
    """Settings from the parsed command line."""
    method = None if args.prune_method is None else [" ".join(args.prune_method.split())]
    flags: dict[str, Any] = {
        "name": args.save_name,
        "architectures": args.arch and [args.arch],
        "datasets": args.dataset and ["image_folder" if args.dataset == "imagenet" else args.dataset],
        "methods": method,
        "device": "cuda" if args.cuda else None,
        "prune_lr": args.prune_learning_rate,
        "target_sparsity": args.target_sparsity,
        "prune_speed": args.prune_speed,
        "stride": args.nim_stride_size,
        "data": {"batch_size": args.batch_size, "workers": args.workers},
        "train": {"epochs": args.epochs, "lr": args.learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay},
    }
    if args.load_name is not None:
        flags["model"] = {"weights": str(args.load_name)}
    return load_settings(NimConfig, args.config_path, args.set, flags)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = arguments().parse_args(argv)
    settings = settings_of(args)
    folder = RunFolder(args.output_dir, settings, args.overwrite)
    if args.prune or not (args.train or args.eval):
        run(settings, folder)
        return
    own_settings = _for(settings, settings.architectures[0], settings.datasets[0])
    seed = settings.seeds[0]
    data = data_of(own_settings, seed)
    found = accuracy(base_model(own_settings, data, seed, folder, say), data, own_settings)
    folder.write_rows([{"architecture": settings.architectures[0], "dataset": settings.datasets[0], "seed": seed, "accuracy": found}])
    say(f"accuracy {found:.4f}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
