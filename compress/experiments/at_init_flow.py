"""Conservation experiments: what enters a unit leaves it, layers share one total, and what a schedule removes at once.

Scores are those of the criteria without special treatment; only synaptic flow and signed SNIP are conserved exactly.
Source: Tanaka et al. 2020, arXiv:2006.05467, sections 3 to 5.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import DataBundle
from compress.errors import UserError
from compress.experiments.at_init_runs import attach, cut, train
from compress.experiments.at_init_settings import SCHEDULES, AtInitConfig
from compress.experiments.base import Log
from compress.experiments.training import steps_per_epoch
from compress.saliency import SALIENCY, score_weights


def scores(settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, seed: int) -> dict[str, Tensor]:
    """Scores of the unpruned network."""
    generator = torch.Generator().manual_seed(seed)
    masks = attach(settings, copy.deepcopy(model))
    batches = None
    if SALIENCY[pruner].needs_data:
        batches = data.calibration(settings.images_per_class * data.num_classes, settings.prune_batch_size, generator)
    options: dict[str, Any] = {"input_shape": data.input_shape} if pruner == "synflow" else {}
    return score_weights(masks.model, masks.names, pruner, batches=batches, generator=generator, **options)


def unit_conservation(settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, seed: int) -> dict[str, Any]:
    """For each hidden unit of a chain the sums of the scores into it (its bias's included) and out of it, and the largest relative gap."""
    found: list[Tensor] = []
    extra: list[Tensor | float] = []
    for name, score in scores(settings, data, model, pruner, seed).items():
        if score.dim() > 1:
            found.append(score.double())
            extra.append(0.0)
        elif name.endswith("bias"):
            extra[-1] = extra[-1] + score.double()
    units, worst = [], 0.0
    for (below, bias), above in zip(zip(found, extra, strict=True), found[1:], strict=False):
        if above.shape[1] % below.shape[0]:
            raise UserError("unit-conservation needs a chain of layers, each reading the one before; choose fc, conv or a VGG.")
        into = below.flatten(1).sum(1) + bias
        out = above.transpose(0, 1).flatten(1).sum(1).reshape(below.shape[0], -1).sum(1)
        units.append([into.tolist(), out.tolist()])
        worst = max(worst, float(((into - out).abs() / out.abs().clamp_min(1e-300)).max()))
    return {"units": units, "largest_relative_gap": worst}


def layer_conservation(settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, seed: int) -> dict[str, Any]:
    """Average score and inverse size of every layer: conserved scores lie on a line through the origin."""
    found = scores(settings, data, model, pruner, seed)
    return {
        "layers": [
            {"name": name, "sum": float(score.double().sum()), "average": float(score.double().mean()), "inverse_size": 1 / score.numel()}
            for name, score in found.items()
        ]
    }


def imp_conservation(settings: AtInitConfig, data: DataBundle, model: nn.Module, seed: int, log: Log) -> dict[str, Any]:
    """Mean squared weight of every layer before training and after each epoch: training evens layers out as conservation does."""
    masks = attach(settings, copy.deepcopy(model))
    courses: dict[str, list[float]] = {name: [] for name in masks.names}

    def record() -> None:
        for name in masks.names:
            courses[name].append(float(masks.parameter(name).detach().double().square().mean()))

    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done % steps_per_epoch(data, settings.data.batch_size) == 0:
            record()

    record()
    train(settings, masks, data, settings.train.epochs, seed, log, after_step)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    return {"mean_square": courses, "inverse_size": {name: 1 / size for name, size in sizes.items()}}


def schedule_conservation(
    settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, ratio: float, seed: int
) -> dict[str, Any]:
    """For each schedule and number of iterations: the largest score that one iteration removes, over the flow.

    The flow is the largest layer's sum of scores, which for conserved scores of a chain is every layer's. The removed score is summed over
    all layers: where it is below the flow (a share below 1) no layer can have lost all its weights at once.
    """
    rows = []
    for schedule in SCHEDULES.values():
        for iterations in settings.iteration_list:
            masks = attach(settings, copy.deepcopy(model))
            shares: list[float] = []

            def observe(index: int, found: dict[str, Tensor], chosen: dict[str, Tensor], masks: Any = masks, shares: list = shares) -> None:
                gone = sum(float(score[masks[name] & ~chosen[name]].double().sum()) for name, score in found.items())
                flow = max(float(score[masks[name]].double().sum()) for name, score in found.items())
                shares.append(gone / flow if flow else 0.0)

            one = settings.model_copy(update={"pruning_schedule": schedule})
            cut(one, masks, data, pruner, 1 / ratio, seed, iterations=iterations, observe=observe)
            empty = sum(not bool(mask.any()) for _, mask in masks.items())
            rows.append({"schedule": schedule, "iterations": iterations, "largest_share": max(shares), "empty_layers": empty})
    return {"schedules": rows}
