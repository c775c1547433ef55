"""A small network, small data and process helpers for the training tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch
from torch import nn

from compress.data import DataBundle, TensorSplit
from compress.data.transforms import Transform


def small_bundle(train: int = 70, val: int = 20, classes: int = 3, side: int = 6, device: str = "cpu") -> DataBundle:
    """Random grey images whose class shifts the brightness, so that a network can learn them."""
    generator = torch.Generator().manual_seed(11)
    transform = Transform(mean=(0.4,), std=(0.25,), padding=1, flip=True)

    def split(count: int) -> TensorSplit:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 100, (count, 1, side, side), generator=generator)
        images = (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        return TensorSplit(images, labels, transform, torch.device(device))

    return DataBundle("small", classes, (1, side, side), split(train), split(val), split(30), transform.mean, transform.std)


def small_network(norm: bool = True, dropout: float = 0.2, classes: int = 3) -> nn.Module:
    """Convolution, BatchNorm (optional), dropout, linear; the same initial weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
        if norm:
            layers.append(nn.BatchNorm2d(4))
        layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, classes)]
        return nn.Sequential(*layers)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a real child process that shares what is imported; its process number. A child that raises exits with 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
