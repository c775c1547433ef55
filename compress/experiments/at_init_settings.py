"""Settings and command line of pruning at initialisation, with the document's own flags."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from compress.config import DataConfig, ModelConfig, TrainConfig
from compress.errors import UserError
from compress.experiments.settings import Experiment, boolean, common_arguments, load_settings, one_of
from compress.saliency import SALIENCY

EXPERIMENTS = ("singleshot", "multishot", "unit-conservation", "layer-conservation", "imp-conservation", "schedule-conservation")
PRUNERS = {"rand": "random", "mag": "magnitude", "snip": "snip", "grasp": "grasp", "synflow": "synflow"}
_CHOICES = [*PRUNERS, "random", "magnitude"]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.0, "nesterov": False},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "adam": {"optimizer": "adam", "momentum": 0.9},
    "rms": {"optimizer": "rmsprop", "momentum": 0.0},
}
SCHEDULES = {"linear": "linear", "exponential": "geometric"}


class AtInitConfig(Experiment):
    """Settings of pruning at initialisation."""

    experiment: Literal[EXPERIMENTS] = Field("singleshot", description=f"one of {', '.join(EXPERIMENTS)}")
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(name="cifar10", batch_size=256, eval_batch_size=256), description="data set"
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(name="vgg16_plain"), description="network")
    pruners: list[str] = Field(["random", "magnitude", "snip", "grasp", "synflow"], min_length=1, description="weight criteria")
    compression_ratios: list[float] = Field([1, 2, 5, 10, 15, 20], min_length=1, description="1 / density, each at least 1")
    iterations: dict[str, int] = Field(
        default_factory=dict, description="score-and-prune rounds by criterion; others: the criterion's default (synflow 100)"
    )
    pruning_schedule: Literal["geometric", "linear"] = Field("geometric", description="density by iteration")
    pool: Literal["global", "local"] = Field("global", description="rank all weights together, or each tensor for itself")
    pre_epochs: dict[str, int] = Field(
        default_factory=lambda: {"magnitude": 200}, description="training before pruning, by criterion; others: none"
    )
    images_per_class: int = Field(10, ge=1, description="training images that score, times the number of classes")
    prune_batch_size: int = Field(256, ge=1, description="images per scoring step")
    prune_train_mode: bool = Field(False, description="BatchNorm uses batch statistics while scoring")
    prune_bias: bool = Field(False, description="mask the biases of the layers in scope too")
    prune_residual: bool = Field(False, description="mask scales on the skip paths too, with which ResNets are then built (skip_scale)")
    dense_classifier: bool = Field(False, description="leave the last linear layer dense")
    reinitialize: bool = Field(False, description="ablation: other initial weights under the mask")
    shuffle: bool = Field(False, description="ablation: shuffle each mask within its tensor")
    invert: bool = Field(False, description="ablation: remove the highest scores first")
    levels: list[int] = Field([1], min_length=1, description="multishot: numbers of train-prune-rewind rounds")
    iteration_list: list[int] = Field([1, 10, 100], min_length=1, description="schedule-conservation: numbers of iterations compared")
    detail_ratio: float = Field(10, ge=1, description="compression ratio of the per-layer tables and histograms")
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig(epochs=100, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="constant"),
        description="training after (and before) pruning",
    )

    @field_validator("compression_ratios")
    @classmethod
    def _ratios(cls, value: list[float]) -> list[float]:
        if any(ratio < 1 for ratio in value):
            raise ValueError("a compression ratio is 1 / density, at least 1")
        return value

    @field_validator("pruners")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        return [one_of(name, SALIENCY.names(), "weight criterion") for name in value]

    @field_validator("iterations", "pre_epochs")
    @classmethod
    def _by_criterion(cls, value: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        least = 1 if info.field_name == "iterations" else 0
        for name, count in value.items():
            one_of(name, SALIENCY.names(), "weight criterion")
            if count < least:
                raise ValueError(f"{name} has {count}, expected at least {least}")
        return value


_SMALL_DEPTHS = ("20", "32", "44", "56", "110", "1202")
_BASIC_DEPTHS, _BOTTLENECK_DEPTHS = ("18", "34"), ("50", "101", "152")


def model_of(kind: str | None, name: str | None) -> dict[str, Any] | None:
    """Our network for the document's `--model-class` and `--model`.

    The wide ResNets have twice the channels; those of 50 and more layers only inside their blocks, as torchvision's. (The original program
    forgets the factor for 18 and 34 layers and builds the plain network.)
    """
    if name is None:
        return None
    kind = kind or "default"
    if kind == "imagenet":
        name = name.replace("-", "_")
        return {"name": f"torchvision/{name}{'_2' if name.startswith('wide') else ''}"}
    if name.startswith("vgg"):
        plain, suffix = name.removesuffix("-bn"), "" if name.endswith("-bn") else "_plain"
        return {"name": f"{plain}_fc3{suffix}"} if kind == "tinyimagenet" else {"name": plain + suffix, "options": {"variant": "average"}}
    wide, depth = name.startswith("wide-"), name.removeprefix("wide-").removeprefix("resnet")
    if depth in _SMALL_DEPTHS:
        return {"name": f"resnet{depth}", "options": {"shortcut": "conv"} | ({"width": 2} if wide else {})}
    if depth in _BASIC_DEPTHS + _BOTTLENECK_DEPTHS:
        return {"name": f"resnet{depth}", "options": {"width" if depth in _BASIC_DEPTHS else "inner_width": 2} if wide else {}}
    if name in ("fc", "conv"):
        return {"name": name}
    raise UserError(
        f"There is no network for --model-class {kind} --model {name}; choose one of the model registry by --set model.name=..."
    )


def _dataset(name: str | None) -> str | None:
    return {"tiny-imagenet": "tiny_imagenet", "imagenet": "image_folder"}.get(name or "", name)


def arguments() -> argparse.ArgumentParser:
    """The command line: the common options and the document's own flags."""
    parser = argparse.ArgumentParser(prog="python -m compress.experiments.at_init", description="Pruning at initialisation.")
    common_arguments(parser)
    train = parser.add_argument_group("training")
    train.add_argument("--dataset", choices=["mnist", "digits", "fashion_mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet"])
    train.add_argument("--model")
    train.add_argument("--model-class", choices=["default", "lottery", "tinyimagenet", "imagenet"])
    train.add_argument("--dense-classifier", type=boolean)
    train.add_argument("--pretrained", type=boolean, help="true needs --set model.weights=FILE")
    train.add_argument("--optimizer", choices=list(OPTIMIZERS))
    train.add_argument("--train-batch-size", type=int)
    train.add_argument("--test-batch-size", type=int)
    train.add_argument("--pre-epochs", type=int)
    train.add_argument("--post-epochs", type=int)
    train.add_argument("--lr", type=float)
    train.add_argument("--lr-drops", type=int, nargs="*", help="epochs")
    train.add_argument("--lr-drop-rate", type=float)
    train.add_argument("--weight-decay", type=float)
    cut = parser.add_argument_group("pruning")
    cut.add_argument("--pruner", choices=_CHOICES)
    cut.add_argument("--pruner-list", nargs="*", choices=_CHOICES)
    cut.add_argument("--compression", help="ambiguous, refused: say --compression-ratio or --compression-exponent")
    cut.add_argument("--compression-list", nargs="*", help="ambiguous, refused as well")
    cut.add_argument("--compression-ratio", type=float, nargs="+", help="1 / density: 5 keeps a fifth of the weights")
    cut.add_argument("--compression-exponent", type=float, nargs="+", help="log10(1 / density): 1 keeps a tenth of the weights")
    cut.add_argument("--prune-epochs", type=int, help="score-and-prune rounds")
    cut.add_argument("--prune-epoch-list", type=int, nargs="*")
    cut.add_argument("--compression-schedule", choices=list(SCHEDULES))
    cut.add_argument("--mask-scope", choices=["global", "local"])
    cut.add_argument("--prune-dataset-ratio", type=int, help="scoring images per class")
    cut.add_argument("--prune-batch-size", type=int)
    for flag in ("bias", "batchnorm", "residual", "train-mode"):
        cut.add_argument(f"--prune-{flag}", type=boolean)
    for flag in ("reinitialize", "shuffle", "invert"):
        cut.add_argument(f"--{flag}", type=boolean)
    cut.add_argument("--level-list", type=int, nargs="*")
    run = parser.add_argument_group("experiment")
    run.add_argument("--experiment", choices=[*EXPERIMENTS, "example"])
    run.add_argument("--expid", help="name of the run folder")
    run.add_argument("--result-dir", dest="output_dir", type=type(parser.get_default("output_dir")), default=argparse.SUPPRESS)
    run.add_argument("--gpu", type=int)
    run.add_argument("--workers", type=int)
    run.add_argument("--no-cuda", action="store_true")
    run.add_argument("--seed", type=int)
    run.add_argument("--verbose", action="store_true", help="accepted; progress is logged once per epoch")
    return parser


def settings_of(args: argparse.Namespace) -> AtInitConfig:
    """Settings from the parsed command line."""
    if args.compression is not None or args.compression_list:
        value = args.compression if args.compression is not None else args.compression_list[0]
        raise UserError(
            f"--compression {value} is ambiguous: the document means {value}x, the original program 10^{value}x; "
            f"say --compression-ratio {value} (density 1/{value}) or --compression-exponent {value} (density 10^-{value})."
        )
    ratios = args.compression_ratio
    if args.compression_exponent is not None:
        if ratios is not None:
            raise UserError("Give --compression-ratio or --compression-exponent, not both.")
        ratios = [10**exponent for exponent in args.compression_exponent]
    pruners = [PRUNERS.get(name, name) for name in args.pruner_list or ([args.pruner] if args.pruner else [])]
    names = pruners or AtInitConfig().pruners
    drops = args.lr_drops
    epochs = args.post_epochs if args.post_epochs is not None else AtInitConfig().train.epochs
    train: dict[str, Any] = {"epochs": args.post_epochs, "lr": args.lr, "gamma": args.lr_drop_rate, "weight_decay": args.weight_decay}
    if args.optimizer is not None:
        train |= OPTIMIZERS[args.optimizer]
    if drops:
        train |= {"schedule": "multistep", "milestones": [drop / epochs for drop in drops if drop < epochs]}
    flags = {
        "name": args.expid or None,
        "experiment": "singleshot" if args.experiment == "example" else args.experiment,
        "seeds": None if args.seed is None else [args.seed],
        "device": "cpu" if args.no_cuda else None if args.gpu is None else f"cuda:{args.gpu}",
        "data": {
            "name": _dataset(args.dataset), "batch_size": args.train_batch_size, "eval_batch_size": args.test_batch_size,
            "workers": args.workers,
        },
        "model": model_of(args.model_class, args.model),
        "pruners": pruners or None,
        "compression_ratios": ratios,
        "iterations": None if args.prune_epochs is None else dict.fromkeys(names, args.prune_epochs),
        "iteration_list": args.prune_epoch_list or None,
        "pruning_schedule": SCHEDULES.get(args.compression_schedule or ""),
        "pool": args.mask_scope,
        "pre_epochs": None if args.pre_epochs is None else dict.fromkeys(names, args.pre_epochs),
        "images_per_class": args.prune_dataset_ratio,
        "prune_batch_size": args.prune_batch_size,
        "prune_train_mode": args.prune_train_mode,
        "prune_bias": args.prune_bias,
        "prune_residual": args.prune_residual,
        "scope": "all-weights" if args.prune_batchnorm else None,
        "dense_classifier": args.dense_classifier,
        "reinitialize": args.reinitialize,
        "shuffle": args.shuffle,
        "invert": args.invert,
        "levels": args.level_list or None,
        "train": train,
    }  # fmt: skip
    settings = load_settings(AtInitConfig, args.config_path, args.set, flags)
    if args.pretrained and settings.model.weights is None:
        raise UserError("--pretrained true needs the weights: --set model.weights=FILE.")
    return settings
