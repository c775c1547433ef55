"""Augmentation and normalisation of whole batches on the device.

Symbols: images [B, C, H, W] uint8, p padding in pixels, (top, left) the crop's corner in the padded image, each in 0..2p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random choices for n images: `top`, `left` [n] int64 and `mirrored` [n] bool."""

    top: Tensor
    left: Tensor
    mirrored: Tensor

    def to(self, device: torch.device) -> Draws:
        return Draws(self.top.to(device), self.left.to(device), self.mirrored.to(device))

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.top[rows], self.left[rows], self.mirrored[rows])


@dataclass(frozen=True)
class Transform:
    """How a data set's images become network inputs: per-channel mean and std in [0, 1] units, crop padding in pixels, mirroring."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool


def draw(n: int, transform: Transform, generator: torch.Generator) -> Draws:
    """Choices for n images; crop corners and mirroring are always drawn, so that the stream does not depend on the settings."""
    corner = torch.randint(0, 2 * transform.padding + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    return Draws(corner[0], corner[1], mirrored & transform.flip)


def crop_and_flip(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """Crop each zero-padded image at its own corner and mirror it where drawn, in one gather; same shape and type as `images`."""
    batch, channels, height, width = images.shape
    device = images.device
    rows = draws.top[:, None] + torch.arange(height, device=device)
    columns = draws.left[:, None] + torch.arange(width, device=device)
    columns = torch.where(draws.mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    each = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def in_grey_levels(values: Sequence[float], device: torch.device) -> Tensor:
    """Per-channel `values` in [0, 1] units as a tensor [1, C, 1, 1] in units of grey levels 0..255."""
    return torch.tensor(values, dtype=torch.float64).mul(255).view(1, -1, 1, 1).to(device, torch.float32)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std as float32; `mean` and `std` [1, C, 1, 1] in grey levels."""
    return images.to(torch.float32).sub_(mean).div_(std)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of uint8 images [N, C, H, W] in [0, 1] units, from exact integer sums."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for part in images.split(4096):
        values = part.to("cpu", torch.int64)
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies would be divided by zero.
    std = torch.where(std > 0, std, torch.full_like(std, 255.0))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
