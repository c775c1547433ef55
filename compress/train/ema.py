"""Exponential moving average of the weights.

After step t = 1, 2, ...: e_t = d_t e_{t-1} + (1 - d_t) p_t with d_t = min(decay, (1 + t) / (10 + t)), e_0 = p_0; the ramp lets short
trainings forget their initial weights. Only trainable parameters are averaged: buffers (BatchNorm statistics) are the network's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of the trainable parameters of one network, `average` by parameter name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [parameter.detach() for parameter in self._parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the average inside the block and with its own weights afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Continue from a saved average."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
        self.updates = updates
