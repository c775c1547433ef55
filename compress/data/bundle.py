"""What `load_data` returns, and the steps that all data sets share: root folder, validation split, statistics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compress.config import DataConfig
from compress.data.draws import derived_generator
from compress.data.split import Split, TensorSplit, check_labels
from compress.data.stratify import stratified
from compress.data.transforms import Transform
from compress.errors import UserError

Shape = tuple[int, int, int]


class DataSet(Protocol):
    """A registered data set."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        """Number of classes and (C, H, W)."""

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        """The checked and split data set."""


@dataclass(frozen=True)
class DataBundle:
    """A loaded data set. `val` is empty where `val_fraction` is 0; `mean` and `std` are per channel in [0, 1] units."""

    name: str
    num_classes: int
    input_shape: Shape
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def calibration(self, n: int, batch_size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """min(n, len(train)) training images without replacement and without augmentation, as batches (x, y)."""
        return self.train.rows(torch.randperm(len(self.train), generator=generator)[:n], batch_size)

    def recalibration(self, n: int, batch_size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """The images of `calibration` under the training augmentation, as the network's BatchNorm layers saw them in training.

        Statistics of images that are not augmented are others: a CIFAR-10 ResNet-20 of 91.7 % has 88.9 % with them, uncompressed.
        """
        return self.train.rows(torch.randperm(len(self.train), generator=generator)[:n], batch_size, augment=generator)


def resolve_root(cfg: DataConfig, *, create: bool = False) -> Path:
    """The folder of the data set: `cfg.root`, else the environment variable COMPRESS_DATA; made where `create` is true.

    Raises `UserError` where neither is given, or the folder does not exist.
    """
    given, source = (cfg.root, "data.root") if cfg.root is not None else (os.environ.get("COMPRESS_DATA"), "COMPRESS_DATA")
    if not given:
        raise UserError(f"The data set {cfg.name!r} needs a folder: set data.root or the environment variable COMPRESS_DATA.")
    root = Path(given).expanduser()
    if create:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder {root} given by {source} cannot be made: {error.strerror or error}.") from error
    if not root.is_dir():
        raise UserError(f"The folder {root} given by {source} for the data set {cfg.name!r} does not exist.")
    return root


def make_transform(cfg: DataConfig, mean: tuple[float, ...], std: tuple[float, ...], *, padding: int, flip: bool) -> Transform:
    """The data set's own settings with what `cfg` overrides."""
    return Transform(
        mean=tuple(cfg.mean) if cfg.mean is not None else tuple(mean),
        std=tuple(cfg.std) if cfg.std is not None else tuple(std),
        padding=cfg.crop_padding if cfg.crop_padding is not None else padding,
        flip=cfg.flip if cfg.flip is not None else flip,
    )


def split_bundle(cfg: DataConfig, seed: int, whole: Split, test: Split, num_classes: int, shape: Shape) -> DataBundle:
    """Take the validation images from the training images `whole` by `seed`, class by class, then cut to `train_images`.

    Every class keeps at least one training image. Raises `UserError` for bad labels, empty classes, or too few images.
    """
    check_labels(whole.labels, num_classes, f"{cfg.name} training")
    check_labels(test.labels, num_classes, f"{cfg.name} test")
    sizes = torch.bincount(whole.labels, minlength=num_classes)
    if int(sizes.min()) == 0:
        raise UserError(f"Class {int(sizes.argmin())} of the data set {cfg.name!r} has no training image; every class needs at least one.")
    train, val = whole, whole.subset(torch.empty(0, dtype=torch.int64))
    if cfg.val_fraction > 0:
        wanted = max(1, round(cfg.val_fraction * len(whole)))
        rows = stratified(whole.labels, wanted, keep=1, generator=derived_generator(seed, "validation split"))
        if len(rows) == 0:
            raise UserError(
                f"No validation image can be taken from the {len(whole)} training images of {cfg.name!r} without emptying a class; "
                "set data.val_fraction to 0."
            )
        rest = torch.ones(len(whole), dtype=torch.bool)
        rest[rows] = False
        train, val = whole.subset(torch.nonzero(rest).flatten()), whole.subset(rows)
    if cfg.train_images is not None:
        if cfg.train_images > len(train):
            raise UserError(f"data.train_images is {cfg.train_images}, but {cfg.name!r} has {len(train)} training images after the split.")
        train = train.subset(stratified(train.labels, cfg.train_images, generator=derived_generator(seed, "train images")))
    return DataBundle(cfg.name, num_classes, shape, train, val, test, whole.transform.mean, whole.transform.std)


def tensor_bundle(
    cfg: DataConfig,
    seed: int,
    device: torch.device,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    transform: Transform,
) -> DataBundle:
    """The bundle of a small data set from (images [n, C, H, W] uint8, labels [n]) of its training and test part."""
    whole, held = TensorSplit(*train, transform, device), TensorSplit(*test, transform, device)
    channels, height, width = train[0].shape[1:]
    return split_bundle(cfg, seed, whole, held, num_classes, (channels, height, width))
