"""The training loop: `fit`.

A step is determined by (seed, epoch, step) and the state before it: the epoch's order and augmentation come from the stream
(seed, "epoch", epoch), dropout from (seed, "dropout", epoch, step, rank). A checkpoint therefore holds no generator state, and a run that was
killed and continued is the run that was not, bit for bit where the device computes reproducibly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.config import TrainConfig
from compress.data.bundle import DataBundle
from compress.data.draws import derive_seed, derived_generator
from compress.data.split import batch_bounds
from compress.errors import RunError, Terminated, UserError
from compress.train.checkpoint import Checkpoints, decode, digest
from compress.train.distill import objective
from compress.train.distributed import Dist
from compress.train.ema import WeightAverage
from compress.train.evaluate import evaluate
from compress.train.modes import mode
from compress.train.optim import learning_rate, make_optimizer
from compress.train.progress import Log, Progress, epoch_line
from compress.train.signals import StopRequest
from compress.train.state import History, TrainingState

__all__ = ["History", "fit"]


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

    `batch_size` counts the images of all processes together. A last batch of fewer than 2 images per process joins the one before it. `steps` caps the
    optimiser steps in all, and the schedule spans what remains. `teacher` is used where `cfg.distill` is set, in evaluation mode. `after_step`
    is called after every optimiser step, before the weight average is updated (weight masks). At the end the network holds the last epoch's
    weights, or the best validation epoch's (`cfg.select`), averaged where `cfg.ema` is set.

    With `checkpoint` the state is saved after every epoch, and `resume` continues from there; a finished training is only loaded.
    The global random state, train/eval flags and the SIGTERM handler are as before afterwards; gradients are dropped.

    Raises `UserError` for impossible settings or a checkpoint that is broken or of another training, `RunError` for a non-finite loss or
    gradient (no parameter is changed by that step, BatchNorm statistics may have taken it in) and `Terminated` after SIGTERM, once the
    running step is done and saved.
    """
    distributed = distributed or Dist()
    distill = getattr(cfg, "distill", None)
    _check(model, data, cfg, batch_size, teacher, distributed)
    limit = 2 * distributed.world_size
    bounds = batch_bounds(len(data.train), batch_size, min_last=limit)
    total = cfg.epochs * len(bounds) if steps is None else min(steps, cfg.epochs * len(bounds))
    if total == 0:
        return []
    trainer = _Trainer(model, data, cfg, batch_size, seed, teacher if distill else None, checkpoint, Progress(log if distributed.is_main else None),
                       distributed, after_step, bounds, total, eval_batch_size)  # fmt: skip
    if checkpoint is not None:
        trainer.load(resume, steps)
    device = next(model.parameters()).device
    with StopRequest() as stop, mode(model, True), _isolated_random_state(device), mode(teacher, False) if teacher else contextlib.nullcontext():
        trainer.run(stop)
    return trainer.state.history


def _check(model: nn.Module, data: DataBundle, cfg: TrainConfig, batch_size: int, teacher: nn.Module | None, distributed: Dist) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("The network has no trainable parameter.")
    if len(data.train) < 2 * distributed.world_size:
        raise UserError(f"{len(data.train)} training image(s) of {data.name!r} are too few; {2 * distributed.world_size} are needed at least.")
    if batch_size < distributed.world_size:
        raise UserError(f"The batch size {batch_size} gives {distributed.world_size} processes less than one image each; raise data.batch_size.")
    if batch_size < 2 * distributed.world_size and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"The batch size {batch_size} gives a process a single image, on which BatchNorm cannot train; raise data.batch_size.")
    if cfg.select == "val" and data.val is None:
        raise UserError("select is 'val', but there are no validation images; set data.val_fraction above 0 or select to 'last'.")
    if getattr(cfg, "distill", None) is not None and teacher is None:
        raise UserError("distill is set, but no teacher network was given.")


@contextmanager
def _isolated_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _seed_default_generators(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()].manual_seed(seed)


class _Trainer:
    """One call of `fit`."""

    def __init__(
        self, model: nn.Module, data: DataBundle, cfg: TrainConfig, batch_size: int, seed: int, teacher: nn.Module | None, checkpoint: Path | None,
        progress: Progress, distributed: Dist, after_step: Callable[[], None] | None, bounds: list[tuple[int, int]], total: int, eval_batch_size: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.cfg, self.batch_size, self.seed, self.teacher = model, data, cfg, batch_size, seed, teacher
        self.progress, self.dist, self.after_step, self.bounds, self.total = progress, distributed, after_step, bounds, total
        self.eval_batch_size = eval_batch_size
        self.device = next(model.parameters()).device
        self.epochs = math.ceil(total / len(bounds))
        self.files = Checkpoints(Path(checkpoint)) if checkpoint is not None else None
        self.fingerprint: dict[str, str] = {}
        distributed.broadcast_([*model.parameters(), *model.buffers()])
        if cfg.channels_last:
            model.to(memory_format=torch.channels_last)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.forward = torch.compile(model) if cfg.compile else model
        average = WeightAverage(model, cfg.ema) if cfg.ema is not None else None
        self.state = TrainingState(model, make_optimizer(model, cfg), average)

    def load(self, resume: bool, steps: int | None) -> None:
        """Continue from the checkpoint, if there is one of this training; `resume=False` deletes it."""
        assert self.files is not None
        transform, data = self.data.train.transform, self.data
        sizes = [len(split) if split is not None else 0 for split in (data.train, data.val, data.test)]
        parts = {
            "configuration": [self.cfg.model_dump(mode="json"), self.batch_size, self.seed, steps],
            "data set": [data.name, sizes, transform.mean, transform.std, transform.padding, transform.flip, digest({"": data.train.labels})],
            "network": digest(self.model.state_dict()),
            "teacher": digest(self.teacher.state_dict()) if self.teacher is not None else None,
        }
        self.fingerprint = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}
        payload = b""
        if self.dist.is_main:
            payload = self._read(resume)
        payload = self.dist.share_bytes(payload)
        if payload[:1] == b"E":
            raise UserError(payload[1:].decode())
        if payload:
            tensors, state = decode(payload[1:])
            self.state.restore(tensors, state["training"])

    def _read(self, resume: bool) -> bytes:
        assert self.files is not None
        if not resume:
            self.files.remove()
            return b""
        try:
            found = self.files.load()
            if found is None:
                return b""
            data, passed_over = found
            _, state = decode(data)
            other = [name for name, value in self.fingerprint.items() if state["fingerprint"].get(name) != value]
            if other:
                raise UserError(
                    f"The checkpoint {self.files.path} belongs to another training (different {', '.join(other)}); use another folder, or start "
                    "over without resuming."
                )
        except UserError as error:
            return b"E" + str(error).encode()
        if passed_over:
            self.progress.line(f"checkpoint {passed_over}; continuing from the one before it")
        self.progress.line(f"continuing from {self.files.path} at epoch {state['training']['epoch'] + 1}, step {state['training']['step'] + 1}")
        return b"C" + data

    def save(self) -> None:
        if self.files is not None and self.dist.is_main:
            self.files.save(self.state.tensors(), {"fingerprint": self.fingerprint, "training": self.state.facts()})

    def run(self, stop: StopRequest) -> None:
        try:
            while self.state.epoch < self.epochs:
                self._epoch(stop)
            self.state.finish()
        finally:
            self.progress.close()
            self.state.optimizer.zero_grad(set_to_none=True)
            if self.cfg.channels_last:
                self.model.to(memory_format=torch.contiguous_format)

    def _epoch(self, stop: StopRequest) -> None:
        state, began = self.state, time.perf_counter()
        bounds = self.bounds[: self.total - state.epoch * len(self.bounds)]
        self.progress.start_epoch(state.epoch + 1, self.epochs, state.step, len(bounds))
        batches = self.data.train.batches(
            self.batch_size, generator=derived_generator(self.seed, "epoch", state.epoch), augment=True, shuffle=True,
            rank=self.dist.rank, world_size=self.dist.world_size, start=state.step, min_last=2 * self.dist.world_size,
        )  # fmt: skip
        for (first, last), (x, y) in zip(bounds[state.step :], batches, strict=False):
            stopping = self._step(x, y, last - first, stop)
            state.step += 1
            if stopping:
                state.seconds += time.perf_counter() - began
                self._leave(f"epoch {state.epoch + 1}, step {state.step} of {len(bounds)}")
        self._end_epoch(began, stop)

    def _step(self, x: Tensor, y: Tensor, count: int, stop: StopRequest) -> bool:
        """One optimiser step on this process's part of a batch of `count` images; whether a process was asked to stop."""
        state, cfg = self.state, self.cfg
        number = state.epoch * len(self.bounds) + state.step
        lr = learning_rate(cfg, number, self.total, len(self.bounds))
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        _seed_default_generators(self.device, derive_seed(self.seed, "dropout", state.epoch, state.step, self.dist.rank))
        if cfg.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        state.optimizer.zero_grad(set_to_none=True)
        loss, correct = self._loss(x, y)
        (loss / count).backward()
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        summary = torch.stack([loss.detach().float(), correct.float(), torch.tensor(float(stop.received), device=loss.device)])
        if self.dist.world_size > 1:
            self.dist.sum_([summary, *gradients, *self.running])
            torch._foreach_div_(self.running, self.dist.world_size) if self.running else None
        norm = torch.nn.utils.get_total_norm(gradients)
        loss_sum, hits, stopping, size = torch.cat([summary, norm.detach().float().reshape(1)]).tolist()
        if not (math.isfinite(loss_sum) and math.isfinite(size)):
            what = f"gradient norm is {size}" if math.isfinite(loss_sum) else f"loss is {loss_sum / count}"
            raise RunError(
                f"The {what} in epoch {state.epoch + 1}, step {state.step + 1} of {len(self.bounds)}, at learning rate {lr:.4g}; training stopped before "
                "this step changed a parameter: lower lr, add warmup_epochs or set grad_clip."
            )
        if cfg.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, cfg.grad_clip, norm)
        state.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        if state.average is not None:
            state.average.update()
        state.loss_sum += loss_sum
        state.correct += int(hits)
        state.images += count
        self.progress.step(loss_sum / count)
        return stopping > 0

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and number of correct answers on (x, y)."""
        distill = getattr(self.cfg, "distill", None)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.cfg.amp == "bf16"):
            logits = self.forward(x)
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(x)
        if logits.ndim != 2 or logits.shape[1] < self.data.num_classes:
            raise UserError(f"The network gives an output of shape {tuple(logits.shape)}, but {self.data.num_classes} classes need (batch, {self.data.num_classes}).")
        loss = objective(logits.float(), y, taught.float() if taught is not None else None, distill, self.cfg.label_smoothing)
        return loss, (logits.detach().argmax(1) == y).sum()

    def _end_epoch(self, began: float, stop: StopRequest) -> None:
        state = self.state
        val: dict[str, Any] = {"loss": None, "accuracy": None}
        if self.data.val is not None:
            with state.evaluated() as model:
                val = evaluate(model, self.data.val, self.eval_batch_size, amp=self.cfg.amp, channels_last=self.cfg.channels_last, distributed=self.dist)
            if self.cfg.select == "val":
                state.keep_if_best(val["accuracy"], val["loss"])
        row = {
            "epoch": state.epoch + 1,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": state.loss_sum / state.images,
            "train_accuracy": state.correct / state.images,
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "seconds": state.seconds + time.perf_counter() - began,
        }
        state.history.append(row)
        self.progress.line(epoch_line(row, self.epochs))
        state.next_epoch()
        self.save()
        stopping = torch.tensor([float(stop.received)], device=self.device)
        self.dist.sum_([stopping])
        if stopping.item() > 0:
            self._leave(f"epoch {row['epoch']}", saved=True)

    def _leave(self, where: str, saved: bool = False) -> None:
        if not saved:
            self.save()
        kept = f"the state was saved in {self.files.path} and the same command continues" if self.files is not None else "nothing was saved, for no checkpoint was asked for"
        raise Terminated(f"SIGTERM was received and training stopped after {where}; {kept}.")
