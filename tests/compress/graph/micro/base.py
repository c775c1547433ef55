"""The table `CASES` and the parts from which its networks are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class Net(nn.Module):
    """Layers given by name, and a forward function of (net, x)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass
class Case:
    """`free`: layers that must lose channels. `pinned`: layers that must keep theirs, with a word that the reason must contain."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 3, 6, 6)
    free: tuple[str, ...] = ()
    pinned: dict[str, str] = field(default_factory=dict)
    integers: int = 0


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


CASES: dict[str, Case] = {}


def case(shape: tuple[int, ...] = (1, 3, 6, 6), free: str = "", pinned: dict[str, str] | None = None, integers: int = 0) -> Callable:
    def store(function: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[function.__name__] = Case(function, shape, tuple(free.split()), pinned or {}, integers)
        return function

    return store
