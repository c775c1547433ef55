"""The steps and epochs of one training; see `compress.train.loop` for what makes them reproducible."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import TrainConfig
from compress.data.bundle import DataBundle
from compress.data.draws import derive_seed, derived_generator
from compress.errors import RunError, Terminated, UserError
from compress.train.checkpoint import Checkpoints, decode, digest
from compress.train.distill import objective
from compress.train.distributed import Dist
from compress.train.ema import WeightAverage
from compress.train.evaluate import evaluate
from compress.train.optim import learning_rate, make_optimizer
from compress.train.progress import Progress, epoch_line
from compress.train.signals import StopRequest
from compress.train.state import TrainingState


def seed_default_generators(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from: the CPU's and that of `device`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()].manual_seed(seed)


@dataclass
class Trainer:
    """One call of `fit`: `total` optimiser steps over epochs whose batches have the positions `bounds`."""

    model: nn.Module
    data: DataBundle
    cfg: TrainConfig
    batch_size: int
    eval_batch_size: int
    seed: int
    teacher: nn.Module | None
    after_step: Callable[[], None] | None
    bounds: list[tuple[int, int]]
    total: int
    files: Checkpoints | None
    progress: Progress
    dist: Dist
    fingerprint: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, cfg = self.model, self.cfg
        self.device = next(model.parameters()).device
        self.epochs = math.ceil(self.total / len(self.bounds))
        self.distill = getattr(cfg, "distill", None)
        self.dist.broadcast_([*model.parameters(), *model.buffers()])
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
        data, transform = self.data, self.data.train.transform
        settings = [transform.mean, transform.std, transform.padding, transform.flip]
        sizes = [len(split) for split in (data.train, data.val, data.test)]
        parts = {
            "configuration": [self.cfg.model_dump(mode="json"), self.batch_size, self.seed, steps],
            "data set": [data.name, sizes, settings, digest({"labels": data.train.labels})],
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
                    f"The checkpoint {self.files.path} belongs to another training (different {', '.join(other)}); use another folder, or "
                    "start over without resuming."
                )
        except UserError as error:
            return b"E" + str(error).encode()
        if passed_over:
            self.progress.line(f"checkpoint {passed_over}; continuing from the one before it")
        at = state["training"]
        self.progress.line(f"continuing from {self.files.path} after {at['epoch']} epochs and {at['step']} steps")
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
        # Closed at once when a step raises: workers that decode images would otherwise live as long as the traceback.
        with contextlib.closing(batches):
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
        seed_default_generators(self.device, derive_seed(self.seed, "dropout", state.epoch, state.step, self.dist.rank))
        if cfg.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        state.optimizer.zero_grad(set_to_none=True)
        loss, correct = self._loss(x, y)
        (loss / count).backward()
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        summary = torch.stack([loss.detach().float(), correct.float(), torch.full_like(loss, stop.received, dtype=torch.float32)])
        if self.dist.world_size > 1:
            # BatchNorm statistics are averaged with every step, so that an interruption between two steps changes nothing.
            self.dist.sum_([summary, *gradients, *self.running])
            for buffer in self.running:
                buffer.div_(self.dist.world_size)
        norm = torch.nn.utils.get_total_norm(gradients)
        loss_sum, hits, stopping, size = torch.cat([summary, norm.float().reshape(1)]).tolist()
        if not (math.isfinite(loss_sum) and math.isfinite(size)):
            what = f"gradient norm is {size}" if math.isfinite(loss_sum) else f"loss is {loss_sum / count}"
            raise RunError(
                f"The {what} in epoch {state.epoch + 1}, step {state.step + 1} of {len(self.bounds)}, at learning rate {lr:.4g}; training "
                "stopped before this step changed a parameter: lower lr, add warmup_epochs or set grad_clip."
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
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.cfg.amp == "bf16"):
            logits = self.forward(x)
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(x)
        if logits.ndim != 2 or logits.shape[1] < self.data.num_classes:
            wanted = (len(x), self.data.num_classes)
            raise UserError(f"The network's output has shape {tuple(logits.shape)}, but {self.data.name!r} needs {wanted}.")
        loss = objective(logits.float(), y, taught.float() if taught is not None else None, self.distill, self.cfg.label_smoothing)
        return loss, (logits.detach().argmax(1) == y).sum()

    def _end_epoch(self, began: float, stop: StopRequest) -> None:
        state = self.state
        val: dict[str, Any] = {"loss": None, "accuracy": None}
        if len(self.data.val) > 0:
            options = {"amp": self.cfg.amp, "channels_last": self.cfg.channels_last, "distributed": self.dist}
            with state.evaluated() as model:
                val = evaluate(model, self.data.val, self.eval_batch_size, **options)
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
        kept = "nothing was saved, for no checkpoint was asked for"
        if self.files is not None:
            kept = f"the state was saved in {self.files.path} and the same command continues"
        raise Terminated(f"SIGTERM was received and training stopped after {where}; {kept}.")
