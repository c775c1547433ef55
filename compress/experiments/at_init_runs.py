"""The runs of pruning at initialisation: prune once or level by level, train, and measure what is left."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compress.data import DataBundle
from compress.effective import report
from compress.errors import UserError
from compress.experiments.at_init_settings import AtInitConfig
from compress.experiments.base import Log, accuracy, fresh_model
from compress.masks import Masks, prune
from compress.masks.restart import reinitialize, rewind, shuffle, snapshot
from compress.saliency import SALIENCY
from compress.siblings import own
from compress.train import evaluate, fit

BINS = 60


def initial(settings: AtInitConfig, data: DataBundle, seed: int) -> nn.Module:
    """The network with initial weights of this seed, with scales on its skip paths where those are pruned too."""
    if settings.prune_residual:
        chosen = settings.model
        if chosen.name is None or "skip_scale" not in own("models").info(chosen.name, **chosen.options).options:
            raise UserError(f"prune_residual needs scales on skip paths, which {chosen.name!r} has not; choose one of our ResNets.")
        settings = settings.model_copy(update={"model": chosen.model_copy(update={"options": {**chosen.options, "skip_scale": True}})})
    return fresh_model(settings, data, seed)


def start_model(settings: AtInitConfig, data: DataBundle, seed: int) -> nn.Module:
    """The network to prune: initial weights of this seed, or `model.weights`."""
    model = initial(settings, data, seed)
    if settings.model.weights is not None:
        own("models").load_weights(model, own("models").find_weights(settings.model.weights))
    return model


def attach(settings: AtInitConfig, model: nn.Module) -> Masks:
    """All-True masks on everything that is prunable."""
    exclude = list(settings.exclude)
    if settings.dense_classifier:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        exclude += linear[-1:]
    return Masks.attach(model, settings.scope, exclude, settings.prune_bias, settings.prune_residual)


def rounds(settings: AtInitConfig, pruner: str) -> int:
    """Score-and-prune rounds of a criterion."""
    return settings.iterations.get(pruner, SALIENCY[pruner].iterations)


def cut(settings: AtInitConfig, masks: Masks, data: DataBundle, pruner: str, density: float, seed: int, **options: Any) -> None:
    """Prune to `density` by the criterion, with the settings' data, schedule and pool; empty layers are allowed and reported."""
    generator = torch.Generator().manual_seed(seed)
    needs_data = SALIENCY[pruner].needs_data
    batches = None
    if needs_data:
        batches = data.calibration(settings.images_per_class * data.num_classes, settings.prune_batch_size, generator)
    own_options: dict[str, Any] = {"input_shape": data.input_shape} if pruner == "synflow" else {}
    if needs_data and settings.prune_train_mode:
        own_options["train_mode"] = True
    options = {"iterations": rounds(settings, pruner)} | options
    prune(
        masks, pruner, density, schedule=settings.pruning_schedule, pool=settings.pool, allow_empty=True, invert=settings.invert,
        batches=batches, generator=generator, options=own_options, **options,
    )  # fmt: skip


def train(
    settings: AtInitConfig,
    masks: Masks,
    data: DataBundle,
    epochs: int,
    seed: int,
    log: Log,
    after_step: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Train under the masks for `epochs` epochs."""
    cfg = settings.train.model_copy(update={"epochs": epochs})
    sizes = {"batch_size": settings.data.batch_size, "eval_batch_size": settings.data.eval_batch_size}
    return fit(masks.model, data, cfg, **sizes, seed=seed, log=log, after_step=after_step)


def histogram(values: torch.Tensor, bins: int = BINS) -> dict[str, list]:
    """Bin edges and counts of the kept weights of one layer."""
    if values.numel() == 0:
        return {"edges": [-1.0, 1.0], "counts": [0]}
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 1e-6, high + 1e-6
    counts = torch.histc(values.float().cpu(), bins, low, high)
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), "counts": [int(count) for count in counts]}


def timed_test(model: nn.Module, data: DataBundle, settings: AtInitConfig, enough: float = 1.0, most: int = 9) -> tuple[dict[str, float], float]:
    """Loss and accuracy on the test images, and the median seconds of a pass: at most `most` passes, and no further one after `enough`
    seconds, so that short ones are repeated and long ones are not."""
    taken: list[float] = []
    while len(taken) < most and sum(taken) < enough:
        began = time.perf_counter()
        test = evaluate(model, data.test, settings.data.eval_batch_size)
        taken.append(time.perf_counter() - began)
    return test, statistics.median(taken)


def finish(settings: AtInitConfig, masks: Masks, data: DataBundle, seed: int, log: Log) -> dict[str, Any]:
    """Measure the masked network, train it, and measure it again."""
    found = report(masks, data.input_shape).to_dict()
    row: dict[str, Any] = {"density": masks.density, "accuracy_pruned": accuracy(masks.model, data, settings)}
    before = {name: histogram(masks.parameter(name).detach()[mask]) for name, mask in masks.items()}
    history = train(settings, masks, data, settings.train.epochs, seed, log)
    test, seconds = timed_test(masks.model, data, settings)
    row |= {"accuracy": test["accuracy"], "test_loss": test["loss"], "test_seconds": seconds}
    after = {name: histogram(masks.parameter(name).detach()[mask]) for name, mask in masks.items()}
    return row | {"structure": found, "history": history, "histograms": {"pruned": before, "trained": after}}


def ablate(settings: AtInitConfig, masks: Masks, data: DataBundle, state: dict, seed: int) -> None:
    """Shuffle the masks or take other initial weights, where the settings say so."""
    if settings.shuffle:
        shuffle(masks, torch.Generator().manual_seed(seed))
        rewind(masks, state)
    if settings.reinitialize:
        reinitialize(masks, initial(settings, data, seed + 1000))


def singleshot(
    settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, ratio: float, seed: int, log: Log
) -> dict[str, Any]:
    """Train `pre_epochs`, prune to density 1/ratio, train. `model` is not changed."""
    masks = attach(settings, copy.deepcopy(model))
    if settings.pre_epochs.get(pruner, 0):
        train(settings, masks, data, settings.pre_epochs[pruner], seed, log)
    state = snapshot(masks.model)
    cut(settings, masks, data, pruner, 1 / ratio, seed)
    ablate(settings, masks, data, state, seed)
    return finish(settings, masks, data, seed, log)


def multishot(
    settings: AtInitConfig, data: DataBundle, model: nn.Module, pruner: str, ratio: float, levels: int, seed: int, log: Log
) -> dict[str, Any]:
    """`levels` times: train `pre_epochs`, prune to density ratio^-((l+1)/levels), rewind everything but masks; then train."""
    masks = attach(settings, copy.deepcopy(model))
    state = snapshot(masks.model)
    densities = []
    for level in range(levels):
        if settings.pre_epochs.get(pruner, 0):
            train(settings, masks, data, settings.pre_epochs[pruner], seed + level, log)
        cut(settings, masks, data, pruner, ratio ** (-(level + 1) / levels), seed + level)
        rewind(masks, state)
        densities.append(masks.density)
    ablate(settings, masks, data, state, seed)
    return finish(settings, masks, data, seed, log) | {"densities": densities}


def rows_of(found: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A flat row with the run's structure and lists inside."""
    structure = found["structure"]
    names = ("kept", "effective_density", "effective_compression_ratio", "dead_channels", "macs", "macs_nonzero")
    flat = {key: structure[key] for key in names} | {"empty_layers": len(structure["empty_layers"])}
    return facts | {key: value for key, value in found.items() if not isinstance(value, (dict, list))} | flat | found


def all_runs(settings: AtInitConfig) -> Sequence[tuple[str, float, int | None]]:
    """Every (pruner, ratio, levels) of the settings; levels is None for a single shot."""
    levels: list[int | None] = list(settings.levels) if settings.experiment == "multishot" else [None]
    return [(pruner, ratio, level) for pruner in settings.pruners for ratio in settings.compression_ratios for level in levels]
