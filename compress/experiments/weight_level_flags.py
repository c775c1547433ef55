"""The command line of weight-level pruning: the document's own flags, and our networks for its architectures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.experiments.settings import common_arguments

_FIXED = {"vgg": "vgg16_weight_level", "vgg16": "vgg16_weight_level"} | {
    name: name for name in ("resnet20", "resnet32", "resnet56", "resnet110", "preresnet110", "preresnet164", "wrn_16_8", "wrn_28_10")
}
# Families whose networks are named by --depth (and --block-name or --widen-factor).
_FAMILIES = ("resnet", "preresnet", "wrn")
_DEPTHS = {"resnet": (20, 32, 44, 56, 110, 1202), "preresnet": (110, 164), "wrn": (16, 28)}


def network_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Name and options of the network of `--arch`, `--depth`, `--block-name` and `--widen-factor`; None where none is given."""
    extra = {"--depth": args.depth, "--block-name": args.block_name, "--widen-factor": args.widen_factor}
    given = [flag for flag, value in extra.items() if value is not None]
    if args.arch is None:
        if given:
            raise UserError(f"{given[0]} says which network of a family is meant; give --arch too ({', '.join(_FAMILIES)}).")
        return None
    if args.arch in _FIXED:
        wrong = [flag for flag in given if not (flag == "--block-name" and _says_nothing_new(args))]
        if wrong:
            raise UserError(f"--arch {args.arch} is one network, which {wrong[0]} does not change; give --arch {' or '.join(_FAMILIES)}.")
        return {"name": _FIXED[args.arch]}
    if args.depth not in _DEPTHS[args.arch]:
        known = ", ".join(map(str, _DEPTHS[args.arch]))
        raise UserError(f"--arch {args.arch} needs --depth, one of {known}; got {'none' if args.depth is None else args.depth}.")
    if args.widen_factor is not None and args.arch != "wrn":
        raise UserError(f"--widen-factor belongs to --arch wrn, not to {args.arch}.")
    bottleneck = (args.block_name or "").lower() == "bottleneck"
    if args.arch == "wrn":
        if bottleneck:
            raise UserError("The wide ResNets here have basic blocks only; leave --block-name out.")
        return {"name": {16: "wrn_16_8", 28: "wrn_28_10"}[args.depth], "options": {"width": args.widen_factor or 4}}
    if args.arch == "preresnet" and (bottleneck or args.depth == 164):
        return {"name": "preresnet110_bottleneck" if args.depth == 110 else "preresnet164"}
    if bottleneck:
        raise UserError("The ResNets of three stages here have basic blocks only; leave --block-name out, or choose --arch preresnet.")
    return {"name": f"{args.arch}{args.depth}"}


def _says_nothing_new(args: argparse.Namespace) -> bool:
    return (args.block_name.lower() == "bottleneck") == (args.arch == "preresnet164")


def arguments(stages: Sequence[str], description: str) -> argparse.ArgumentParser:
    """The common options and the document's own flags."""
    parser = argparse.ArgumentParser(prog="python -m compress.experiments.weight_level", description=description)
    parser.add_argument("stage", choices=stages)
    common_arguments(parser)
    parser.add_argument("--dataset", "-d", choices=["digits", "cifar10", "cifar100"])
    parser.add_argument("--arch", "-a", choices=[*_FIXED, *_FAMILIES])
    parser.add_argument("--depth", type=int, help=f"layers, with --arch {', '.join(_FAMILIES)}")
    parser.add_argument("--block-name", type=str, choices=["BasicBlock", "Bottleneck", "basicblock", "bottleneck"], help="preresnet: kind of block")
    parser.add_argument("--widen-factor", type=int, help="wrn: channels times this, 4 where not given")
    parser.add_argument("--percent", type=float, help="fraction removed, in [0, 1)")
    parser.add_argument("--resume", type=Path, help="network to start from (safetensors)")
    parser.add_argument("--load-model", type=Path, help="the same")
    parser.add_argument("--load-optimizer", help="refused: an interrupted training goes on with its optimizer by itself")
    parser.add_argument("--evaluate", "-e", action="store_true", help="train: only measure the accuracy of --resume")
    parser.add_argument("--save_dir", type=Path, help="folder for the pruned or fine-tuned network")
    parser.add_argument("--save", type=Path, help="train: folder for the network")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--schedule", type=int, nargs="+", help="epochs at which the learning rate drops")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--wd", "--weight-decay", type=float, dest="wd")
    parser.add_argument("--train-batch", type=int)
    parser.add_argument("--test-batch", type=int)
    parser.add_argument("--manualSeed", type=int)
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The parsed flags with `--load-model` as `--resume`; `UserError` for flags that contradict each other or that cannot be kept."""
    if args.load_optimizer is not None:
        raise UserError(
            "--load-optimizer has nothing to load: networks are stored without their optimizer; an interrupted training goes on, optimizer "
            "included, when the same command is given again."
        )
    if args.resume is not None and args.load_model is not None:
        raise UserError("Give --resume or --load-model, not both: here they are the same.")
    args.resume = args.resume or args.load_model
    if args.evaluate and (args.stage != "train" or args.resume is None):
        raise UserError("--evaluate measures a trained network: weight_level train --evaluate --resume MODEL.")
    if args.percent is not None and not 0 <= args.percent < 1:
        raise UserError(f"--percent is the fraction removed, in [0, 1), got {args.percent:g}; write 0.3 for 30 percent.")
    return args
