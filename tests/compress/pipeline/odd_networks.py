"""Networks that cannot be trained or stored, each for another reason; named by `model.import` in the tests."""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch import Tensor, nn


class _Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).relu())


class _EvaluationOnly(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("evaluation only\nand a second line")
        return super().forward(x)


class _OneImage(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:1]


class _ExtraState(_Net):
    def get_extra_state(self) -> Any:
        return {"epoch": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def evaluation_only(num_classes: int) -> nn.Module:
    return _EvaluationOnly(num_classes)


def one_image(num_classes: int) -> nn.Module:
    return _OneImage(num_classes)


def extra_state(num_classes: int) -> nn.Module:
    return _ExtraState(num_classes)


def locked(num_classes: int) -> nn.Module:
    model = _Net(num_classes)
    model.lock = threading.Lock()
    return model


def frozen(num_classes: int) -> nn.Module:
    return _Net(num_classes).requires_grad_(False)


def leaves(num_classes: int) -> nn.Module:
    sys.exit("usage")
