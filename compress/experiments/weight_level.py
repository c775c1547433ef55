"""Weight-level pruning of trained networks: train, prune the convolutions by magnitude, fine-tune under the mask.

    python -m compress.experiments.weight_level train    --arch vgg16 --dataset cifar10
    python -m compress.experiments.weight_level prune    --arch vgg16 --dataset cifar10 --percent 0.3 --resume MODEL --save_dir DIR
    python -m compress.experiments.weight_level finetune --arch vgg16 --dataset cifar10 --resume DIR/pruned.safetensors
    python -m compress.experiments.weight_level all      --config_path configs/weight_level/<name>.json

The document's own flags are kept. `--percent` is the fraction of all convolution weights that is removed (0.3 removes 30 %),
ranked together by magnitude, linear layers and normalisation untouched. The published code keeps weights strictly above a threshold and
so removes one more.
Masks are explicit: nothing depends on momentum being fresh.

`all` runs one or several sparsities one after the other, each on the result of the one before (`iterative`) or on the unpruned network, and
adds the arms of the comparison with training from scratch: `finetune`, `rewind` (lottery ticket), `scratch_e` (as many epochs as the
unpruned network had) and `scratch_b` (as much computation).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file

from compress.config import FinetuneConfig, TrainConfig
from compress.data import DataBundle
from compress.effective import report
from compress.errors import UserError
from compress.experiments import weight_level_flags as flags
from compress.experiments.base import Log, RunFolder, accuracy, base_model, data_of, fresh_model, main_guard, recalibrated, say
from compress.experiments.settings import Experiment, load_settings
from compress.files import write_text
from compress.masks import Masks, load_masked, prune, save_masked
from compress.masks.restart import rewind, scratch, scratch_b_epochs, snapshot
from compress.siblings import own
from compress.train import fit

ARMS = ("finetune", "rewind", "scratch_e", "scratch_b")


class WeightLevelConfig(Experiment):
    """Settings of weight-level pruning."""

    scope: Literal["conv", "conv+linear", "all-weights"] = Field("conv", description="what masks may touch")
    sparsities: list[float] = Field([0.6], min_length=1, description="fractions removed, one after the other")
    iterative: bool = Field(False, description="prune the fine-tuned network of the sparsity before, instead of the unpruned one")
    arms: list[str] = Field(["finetune"], min_length=1, description=f"what follows a prune: {', '.join(ARMS)}")
    recalibration_images: int = Field(0, ge=0, description="also measure accuracy after BatchNorm statistics of so many images; 0: do not")
    allow_empty: bool = Field(False, description="let a layer lose all its weights")
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig(
            epochs=300, lr=0.1, weight_decay=1e-4, nesterov=False, schedule="multistep", milestones=[0.5, 0.75], gamma=0.1
        ),
        description="training of the unpruned network, and from scratch",
    )
    finetune: FinetuneConfig = Field(
        default_factory=lambda: FinetuneConfig(epochs=40, lr=1e-3, weight_decay=1e-4, nesterov=False, schedule="constant"),
        description="training of the pruned network",
    )

    @field_validator("sparsities")
    @classmethod
    def _fractions(cls, value: list[float]) -> list[float]:
        for sparsity in value:
            if not 0 <= sparsity < 1:
                raise ValueError(f"a sparsity is the fraction removed, in [0, 1), got {sparsity:g}")
        return value


def cut(masks: Masks, sparsity: float, allow_empty: bool = False) -> str:
    """Prune by magnitude and return the text of the document's `prune.txt`: per layer, and in all."""
    prune(masks, "magnitude", 1 - sparsity, allow_empty=allow_empty)
    lines = [f"{name} total {mask.numel()} remaining {int(mask.sum())}" for name, mask in masks.items()]
    lines += [f"warning: {name} is empty" for name, mask in masks.items() if not bool(mask.any())]
    return "\n".join([*lines, f"total {masks.total} pruned {masks.total - masks.kept} sparsity {1 - masks.density:.8f}"]) + "\n"


def train_masked(
    masks: Masks, data: DataBundle, settings: WeightLevelConfig, cfg: TrainConfig, seed: int, log: Log
) -> list[dict[str, Any]]:
    """Train under the masks; the history of `fit`."""
    return fit(masks.model, data, cfg, batch_size=settings.data.batch_size, seed=seed, log=log)


def _arm(arm: str, masks: Masks, data: DataBundle, settings: WeightLevelConfig, seed: int, log: Log) -> list[dict[str, Any]]:
    """Bring the pruned network to the arm's starting point and train it."""
    if arm == "finetune":
        return train_masked(masks, data, settings, settings.finetune, seed, log)
    epochs = settings.train.epochs
    if arm == "rewind":
        rewind(masks, snapshot(fresh_model(settings, data, seed)))
    else:
        scratch(masks, fresh_model(settings, data, seed + 1000), torch.Generator().manual_seed(seed))
        if arm == "scratch_b":
            found = report(masks, data.input_shape)
            epochs = scratch_b_epochs(epochs, found.macs, found.macs_nonzero)
    return train_masked(masks, data, settings, settings.train.model_copy(update={"epochs": epochs}), seed, log)


def run(settings: WeightLevelConfig, folder: RunFolder, log: Log = say) -> list[dict[str, Any]]:
    """`all`: every seed, sparsity and arm; returns one row per arm and the rows without training."""
    for arm in settings.arms:
        if arm not in ARMS:
            raise UserError(f"Unknown arm {arm!r}; known: {', '.join(ARMS)}.")
    if settings.iterative and settings.arms != ["finetune"]:
        raise UserError('`iterative` prunes the fine-tuned network again; it takes arms = ["finetune"] only.')
    if "rewind" in settings.arms and settings.model.weights is not None:
        raise UserError(
            "The arm 'rewind' needs the initial weights of the trained network; leave model.weights out, so that it is trained here."
        )
    rows = []
    for seed in settings.seeds:
        data = data_of(settings, seed)
        base = base_model(settings, data, seed, folder, log)
        dense = accuracy(base, data, settings)
        start = base
        for sparsity in settings.sparsities:
            for arm in settings.arms:
                key, file = f"{arm}-{sparsity:g}-s{seed}", folder.path / "networks" / f"{arm}-{sparsity:g}-s{seed}.safetensors"

                def once(
                    arm: str = arm,
                    sparsity: float = sparsity,
                    file: Path = file,
                    start: Any = start,
                    data: DataBundle = data,
                    seed: int = seed,
                ) -> dict:
                    masks = Masks.attach(copy.deepcopy(start), settings.scope, settings.exclude)
                    text = cut(masks, sparsity, settings.allow_empty)
                    row: dict[str, Any] = {"accuracy_pruned": accuracy(masks.model, data, settings)}
                    if settings.recalibration_images:
                        twin = recalibrated(masks.model, data, settings.recalibration_images, seed)
                        row["accuracy_recalibrated"] = accuracy(twin, data, settings)
                    history = _arm(arm, masks, data, settings, seed, log)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_masked(masks, file)
                    write_text(file.with_suffix(".txt"), text)
                    found = report(masks, data.input_shape).to_dict()
                    row["accuracy"] = accuracy(masks.model, data, settings) if history else row["accuracy_pruned"]
                    return row | {"epochs": len(history), "sparsity": 1 - masks.density, "history": history, "structure": found}

                found = folder.run(key, once, log)
                params = sum(p.numel() for p in base.parameters()) - found["structure"]["weights"] + found["structure"]["kept"]
                macs = {"macs": found["structure"]["macs"], "macs_nonzero": found["structure"]["macs_nonzero"]}
                rows.append(
                    {"arm": arm, "target": sparsity, "seed": seed, "scope": settings.scope, "accuracy_base": dense, "params": params}
                    | macs
                    | found
                )
                if settings.iterative:
                    start = load_masked(fresh_model(settings, data, seed), file).model
    folder.write_rows(rows)
    return rows


def _save(model: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, path)


def command_train(settings: WeightLevelConfig, args: argparse.Namespace) -> None:
    """Train the unpruned network and save it, from `--resume` on where that is given; or only measure that one."""
    seed = settings.seeds[0]
    data = data_of(settings, seed)
    if args.evaluate:
        model = fresh_model(settings, data, seed)
        own("models").load_weights(model, args.resume)
        say(f"accuracy {accuracy(model, data, settings):.4f}")
        return
    folder = RunFolder(args.output_dir, settings, args.overwrite)
    if args.resume is None:
        model = base_model(settings, data, seed, folder, say)
    else:
        model = fresh_model(settings, data, seed)
        own("models").load_weights(model, args.resume)
        fit(model, data, settings.train, batch_size=settings.data.batch_size, seed=seed, log=say)
    path = (args.save or folder.path) / "model.safetensors"
    _save(model, path)
    say(f"accuracy {accuracy(model, data, settings):.4f}; saved {path}")


def command_prune(settings: WeightLevelConfig, args: argparse.Namespace) -> None:
    """Prune a trained network: `pruned.safetensors` and `prune.txt`."""
    if args.resume is None or args.save_dir is None:
        raise UserError("`prune` needs --resume (the trained network) and --save_dir (the folder for the result).")
    seed = settings.seeds[0]
    data = data_of(settings, seed)
    model = fresh_model(settings, data, seed)
    own("models").load_weights(model, args.resume)
    before = accuracy(model, data, settings)
    masks = Masks.attach(model, settings.scope, settings.exclude)
    text = cut(masks, settings.sparsities[0], settings.allow_empty)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    save_masked(masks, args.save_dir / "pruned.safetensors")
    text = f"accuracy before {before:.4f}\n{text}accuracy after {accuracy(model, data, settings):.4f}\n"
    write_text(args.save_dir / "prune.txt", text)
    say(text.rstrip())


def command_finetune(settings: WeightLevelConfig, args: argparse.Namespace) -> None:
    """Train a pruned network under its mask: `finetuned.safetensors` and `log_finetune.txt` beside it."""
    if args.resume is None:
        raise UserError("`finetune` needs --resume (the pruned network).")
    seed = settings.seeds[0]
    data = data_of(settings, seed)
    masks = load_masked(fresh_model(settings, data, seed), args.resume)
    history = train_masked(masks, data, settings, settings.finetune, seed, say)
    target = args.save_dir or args.resume.parent
    target.mkdir(parents=True, exist_ok=True)
    save_masked(masks, target / "finetuned.safetensors")
    lines = ["lr train_loss valid_loss train_accuracy valid_accuracy"]
    lines += [" ".join(str(row[key]) for key in ("lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy")) for row in history]
    write_text(target / "log_finetune.txt", "\n".join(lines) + "\n")
    say(f"sparsity {1 - masks.density:.8f}, accuracy {accuracy(masks.model, data, settings):.4f}")


COMMANDS = {"train": command_train, "prune": command_prune, "finetune": command_finetune}


def arguments() -> argparse.ArgumentParser:
    """The command line: the common options and the document's own flags."""
    return flags.arguments([*COMMANDS, "all"], __doc__.split("\n")[0])


def settings_of(args: argparse.Namespace) -> WeightLevelConfig:
    """Settings from the parsed command line."""
    args = flags.checked(args)
    cfg: dict[str, Any] = {"epochs": args.epochs, "gamma": args.gamma, "lr": args.lr, "momentum": args.momentum, "weight_decay": args.wd}
    if args.schedule is not None:
        epochs = args.epochs or WeightLevelConfig().model_dump()["finetune" if args.stage == "finetune" else "train"]["epochs"]
        drops = [epoch / epochs for epoch in args.schedule if epoch < epochs]
        cfg |= {"schedule": "multistep", "milestones": drops} if drops else {"schedule": "constant"}
    given: dict[str, Any] = {
        "data": {"name": args.dataset, "batch_size": args.train_batch, "eval_batch_size": args.test_batch},
        "sparsities": None if args.percent is None else [args.percent],
        "seeds": None if args.manualSeed is None else [args.manualSeed],
        "finetune" if args.stage == "finetune" else "train": cfg,
        "model": flags.network_of(args),
    }
    if args.stage == "train" and args.config_path is None:
        given["name"] = f"weight-level-{args.arch or 'model'}-{args.dataset or 'data'}"
    return load_settings(WeightLevelConfig, args.config_path, args.set, given)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = arguments().parse_args(argv)
    settings = settings_of(args)
    if args.stage == "all":
        run(settings, RunFolder(args.output_dir, settings, args.overwrite))
    else:
        COMMANDS[args.stage](settings, args)


if __name__ == "__main__":
    sys.exit(main_guard(main))
