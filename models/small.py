"""Small networks for fast studies: fc (six linear layers) and conv (two convolutions and a linear layer).

Both are those of the SynFlow study (Tanaka et al. 2020, arXiv:2006.05467), with ReLU in between. Their linear layers read every pixel, so
the image side is fixed at build time by `image_size`. Initialisation: PyTorch's default.

| name | input, classes | parameters | MACs |
|---|---|---|---|
| fc | 1x28x28, 10 | 119,910 | 119,400 |
| fc | 3x32x32, 10 | 348,710 | 348,200 |
| conv | 1x28x28, 10 | 260,458 | 7,702,016 |
| conv | 3x32x32, 10 | 337,834 | 10,649,600 |
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from .options import whole
from .registry import register


def _side(options: Mapping[str, Any]) -> int:
    return whole("image_size", options["image_size"])


@register("fc", family="small", min_size=_side, exact_size=_side)
def fc(num_classes: int, in_channels: int, image_size: int = 32, width: int = 100, depth: int = 6) -> nn.Sequential:
    """`depth` linear layers with `width` hidden units; `[n, in_channels, image_size, image_size] -> [n, num_classes]`."""
    for name, value in (("image_size", image_size), ("width", width), ("depth", depth)):
        whole(name, value)
    widths = [in_channels * image_size**2] + [width] * (depth - 1)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


@register("conv", family="small", min_size=_side, exact_size=_side)
def conv(num_classes: int, in_channels: int, image_size: int = 32, width: int = 32) -> nn.Sequential:
    """Two 3x3 convolutions of `width` channels and a linear layer; `[n, in_channels, image_size, image_size] -> [n, num_classes]`."""
    for name, value in (("image_size", image_size), ("width", width)):
        whole(name, value)
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * image_size**2, num_classes),
    )
