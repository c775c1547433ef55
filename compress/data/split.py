"""A split: labelled images that are given out in normalised, optionally augmented batches.

The order of an epoch and every image's augmentation are drawn at once when `batches` is called, from a CPU generator; batch k is then a
slice of what was drawn. An interrupted epoch is therefore continued by `start`, and processes share a batch by taking parts of the
same slice, without drawing anything again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from compress.data.transforms import Draws, Transform, crop_and_flip, draw, in_grey_levels, normalise
from compress.errors import UserError


def batch_bounds(images: int, batch_size: int, *, drop_last: bool = False, min_last: int = 1) -> list[tuple[int, int]]:
    """First and one-past-last position of every batch of `images` images.

    A last batch of fewer than `min_last` images is merged into the one before it (BatchNorm cannot train on one image, and every
    process needs its share); with `drop_last` any last batch below `batch_size` is left out instead.
    """
    starts = list(range(0, images, batch_size))
    if drop_last:
        return [(start, start + batch_size) for start in starts if start + batch_size <= images]
    if len(starts) > 1 and images - starts[-1] < min_last:
        starts.pop()
    return list(zip(starts, [*starts[1:], images], strict=False))


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Raise `UserError` unless every label [n] lies in 0..num_classes-1 and there is at least one."""
    if labels.numel() == 0:
        raise UserError(f"The {where} images are empty; at least one labelled image is needed.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(f"The {where} labels range from {low} to {high}, but {num_classes} classes allow only 0 to {num_classes - 1}.")


class Split(ABC):
    """Labelled images of one part of a data set; `len(split)` images, `labels` [n] int64 on the CPU.

    A subclass fetches uint8 images by row number.
    """

    def __init__(self, labels: Tensor, transform: Transform, device: torch.device) -> None:
        self.labels = labels.to("cpu", torch.int64)
        self.transform = transform
        self.device = device
        # Made once: a copy to the device per batch would make a GPU wait.
        self._mean, self._std = in_grey_levels(transform.mean, device), in_grey_levels(transform.std, device)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fetch(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of row numbers [b] (CPU), the images [b, C, H, W] uint8 and labels [b] int64 on the device."""

    @abstractmethod
    def subset(self, rows: Tensor) -> Split:
        """The split of only these rows [m], in this order."""

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        min_last: int = 1,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches (x [b, C, H, W] float32 normalised, y [b] int64) on the device.

        `batch_size` counts the images of all processes together; process `rank` of `world_size` gets its contiguous part of every
        batch (possibly none of a batch smaller than `world_size`). `start` skips so many batches of the same epoch. For `min_last`
        and `drop_last` see `batch_bounds`. `shuffle` and `augment` need a CPU `generator`, of which one state gives one epoch.
        """
        if (shuffle or augment) and generator is None:
            raise ValueError("shuffle and augment draw at random and need a generator")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: impossible")
        count = len(self)
        order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
        draws = draw(count, self.transform, generator).to(self.device) if augment and generator is not None else None
        parts = []
        for first, last in batch_bounds(count, batch_size, drop_last=drop_last, min_last=min_last)[start:]:
            size = last - first
            parts.append(slice(first + size * rank // world_size, first + size * (rank + 1) // world_size))
        return self._give(order, draws, parts)

    def _give(self, order: Tensor, draws: Draws | None, parts: list[slice]) -> Generator[tuple[Tensor, Tensor], None, None]:
        for part, (images, labels) in zip(parts, self.fetch([order[part] for part in parts]), strict=True):
            if draws is not None and (self.transform.padding > 0 or self.transform.flip):
                images = crop_and_flip(images, draws[part], self.transform.padding)
            yield normalise(images, self._mean, self._std), labels

    def rows(self, rows: Tensor, batch_size: int, augment: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
        """The given rows as a list of normalised batches, augmented by draws from the CPU generator `augment` where there is one."""
        parts = [slice(first, last) for first, last in batch_bounds(len(rows), batch_size)]
        draws = None if augment is None else draw(len(rows), self.transform, augment).to(self.device)
        return list(self._give(rows, draws, parts))


class TensorSplit(Split):
    """A split that lives on the device as uint8: images [n, C, H, W]."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform, device: torch.device) -> None:
        super().__init__(labels, transform, device)
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(f"expected uint8 images [n, C, H, W] and n labels, got {images.dtype} {tuple(images.shape)} and {len(labels)}")
        self.images = images.to(device)
        self._device_labels = self.labels.to(device)

    def fetch(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not chunks:
            return
        # One copy to the device per epoch instead of one per batch.
        rows = torch.cat(chunks).to(self.device)
        for part in rows.split([len(chunk) for chunk in chunks]):
            yield self.images[part], self._device_labels[part]

    def subset(self, rows: Tensor) -> TensorSplit:
        return TensorSplit(self.images[rows.to(self.device)], self.labels[rows], self.transform, self.device)
