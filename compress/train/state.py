"""Everything that a training needs to go on: weights, optimiser, average, best weights, position and history.

There are no generator states: order, augmentation and dropout of a step are drawn from streams named by (seed, epoch, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.train.checkpoint import pack_optimizer, unpack_optimizer
from compress.train.ema import WeightAverage

History = list[dict[str, Any]]


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


@dataclass
class TrainingState:
    """`epoch` and `step` (within it) count from 0 and name the next step; sums are those of the running epoch, over all processes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0
    history: History = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_score: tuple[float, float] | None = None

    _FACTS = ("epoch", "step", "loss_sum", "correct", "images", "seconds", "history", "best_score")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint."""
        result = _with_prefix("model", self.model.state_dict()) | _with_prefix("optimizer", pack_optimizer(self.optimizer))
        if self.average is not None:
            result |= _with_prefix("average", self.average.average)
        if self.best is not None:
            result |= _with_prefix("best", self.best)
        return result

    def facts(self) -> dict[str, Any]:
        """All that is not a tensor, as JSON."""
        return {name: getattr(self, name) for name in self._FACTS} | {"updates": self.average.updates if self.average else 0}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The inverse of `tensors` and `facts`."""
        self.model.load_state_dict(_under("model", tensors))
        unpack_optimizer(self.optimizer, _under("optimizer", tensors))
        if self.average is not None:
            self.average.load(_under("average", tensors), facts["updates"])
        device = next(self.model.parameters()).device
        self.best = {name: tensor.to(device) for name, tensor in _under("best", tensors).items()} or None
        for name in self._FACTS:
            setattr(self, name, facts[name])
        self.best_score = tuple(facts["best_score"]) if facts["best_score"] is not None else None

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The network with the weights that are evaluated and kept: the average where there is one."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            yield self.model

    def keep_if_best(self, accuracy: float, loss: float) -> None:
        """Remember the evaluated weights where the accuracy is the highest so far (ties: the lower loss, then the earlier epoch)."""
        score = (accuracy, -loss)
        if self.best_score is None or score > self.best_score:
            self.best_score = score
            with self.evaluated() as model:
                self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.correct, self.images, self.seconds = 0.0, 0, 0, 0.0

    @torch.no_grad()
    def finish(self) -> None:
        """Give the network the weights to keep: the best ones where they were chosen, else the average, else its own."""
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            for name, parameter in self.model.named_parameters():
                if name in self.average.average:
                    parameter.copy_(self.average.average[name])
