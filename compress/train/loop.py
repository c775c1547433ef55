"""The training loop: `fit`.

A step is determined by (seed, epoch, step) and the state before it: the epoch's order and augmentation come from the stream
(seed, "epoch", epoch), dropout from (seed, "dropout", epoch, step, rank). A checkpoint therefore holds no generator state, and a run
that was killed and continued is the run that was not, bit for bit where the device computes reproducibly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.config import TrainConfig
from compress.data.bundle import DataBundle
from compress.data.split import batch_bounds
from compress.errors import UserError
from compress.masks import enforced
from compress.train.checkpoint import Checkpoints
from compress.train.distributed import Dist
from compress.train.modes import mode
from compress.train.progress import Log, Progress
from compress.train.signals import StopRequest
from compress.train.state import History
from compress.train.trainer import Trainer

__all__ = ["History", "check_training", "fit"]


def fit(
    model: nn.Module,
    data: DataBundle,
    cfg: TrainConfig,
    *,
    batch_size: int,
    seed: int,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    log: Log | None = None,
    resume: bool = True,
    distributed: Dist | None = None,
    after_step: Callable[[], None] | None = None,
    steps: int | None = None,
    eval_batch_size: int = 512,
) -> History:
    """Train `model` in place on `data.train` and return one dictionary per epoch.

    Keys: epoch (from 1), lr (of its last step), train_loss and train_accuracy (on the augmented batches as they were trained on),
    val_loss and val_accuracy (of the weights that would be kept; `None` without validation images), seconds.

    `batch_size` counts the images of all processes together. A last batch of fewer than 2 images per process joins the one before it.
    Weight masks that the network carries (`compress.masks`) are enforced after every step.
    `steps` caps the optimiser steps in all, and the schedule spans what remains. `teacher` is used where `cfg.distill` is set, in
    evaluation mode. `after_step` is called after every optimiser step, before the weight average is updated. At the end
    the network holds the last epoch's weights, or the best validation epoch's (`cfg.select`), averaged where `cfg.ema` is set.

    With `checkpoint` the state is saved after every epoch, and `resume` continues from there; a finished training is only loaded.
    The global random state, train/eval flags and the SIGTERM handler are as before afterwards; gradients are dropped.

    Raises `UserError` for impossible settings or a checkpoint that is broken or of another training, `RunError` for a non-finite loss or
    gradient (no parameter is changed by that step, BatchNorm statistics may have taken it in) and `Terminated` after SIGTERM, once the
    running step is done and saved.
    """
    distributed = distributed or Dist()
    distill = getattr(cfg, "distill", None)
    limit = 2 * distributed.world_size
    bounds = batch_bounds(len(data.train), batch_size, min_last=limit)
    total = cfg.epochs * len(bounds) if steps is None else min(steps, cfg.epochs * len(bounds))
    if total == 0:
        return []
    check_training(model, data, cfg, batch_size, distributed)
    if distill is not None and teacher is None:
        raise UserError("distill is set, but no teacher network was given.")
    if teacher is model:
        raise UserError("The teacher must be another network than the one that is trained.")
    trainer = Trainer(
        model=model,
        data=data,
        cfg=cfg,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        seed=seed,
        teacher=teacher if distill is not None else None,
        after_step=after_step,
        bounds=bounds,
        total=total,
        files=Checkpoints(Path(checkpoint)) if checkpoint is not None else None,
        progress=Progress(log if distributed.is_main else None),
        dist=distributed,
    )
    if checkpoint is not None:
        trainer.load(resume, steps)
    quiet_teacher = mode(teacher, False) if trainer.teacher is not None else contextlib.nullcontext()
    with StopRequest() as stop, mode(model, True), quiet_teacher, _isolated_random_state(trainer.device), enforced(model):
        trainer.run(stop)
    return trainer.state.history


def check_training(model: nn.Module, data: DataBundle, cfg: TrainConfig, batch_size: int, distributed: Dist) -> None:
    """Raise `UserError` for settings with which `fit` cannot train `model` on `data`."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("The network has no trainable parameter.")
    processes, images = distributed.world_size, len(data.train)
    if images < 2 * processes:
        raise UserError(f"The data set {data.name!r} has {images} training image(s); {processes} process(es) need {2 * processes}.")
    if batch_size < processes:
        raise UserError(f"The batch size {batch_size} is below one image for each of {processes} processes; raise data.batch_size.")
    if batch_size < 2 * processes and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"The batch size {batch_size} leaves a process one image, on which BatchNorm cannot train; raise data.batch_size.")
    if cfg.select == "val" and len(data.val) == 0:
        raise UserError("select is 'val', but there are no validation images; set data.val_fraction above 0 or select to 'last'.")


@contextmanager
def _isolated_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
