"""Data sets: images and labels on the device, split, normalised and augmented there.

`load_data(cfg, seed=, device=)` gives a `DataBundle` with the splits `train`, `val` (taken from the training images, empty where
`val_fraction` is 0) and `test`; `describe(cfg)` tells classes and input shape beforehand. A data set is one file that registers an
object with `describe(cfg)` and `load(cfg, seed, device)` in `DATASETS`.
"""

from __future__ import annotations

import torch

from compress.config import DataConfig
from compress.data.bundle import DataBundle, DataSet
from compress.data.split import Split, TensorSplit
from compress.errors import UserError
from compress.registry import Registry

__all__ = ["DATASETS", "DataBundle", "DataSet", "Split", "TensorSplit", "describe", "load_data"]

DATASETS: Registry[DataSet] = Registry("data set", "compress.data")


def describe(cfg: DataConfig) -> tuple[int, tuple[int, int, int]]:
    """Number of classes and input shape (C, H, W), without reading a pixel; folders of images are listed to count the classes.

    Raises `UserError` for an unknown name, for a folder that is missing, and for a mean or std of the wrong length.
    """
    num_classes, shape = DATASETS[cfg.name].describe(cfg)
    faults = [
        f"data.{field} has {len(values)} values, but {cfg.name} has {shape[0]} channel{'s' * (shape[0] > 1)}; give one value per channel."
        for field, values in (("mean", cfg.mean), ("std", cfg.std))
        if values is not None and len(values) != shape[0]
    ]
    if faults:
        raise UserError(*faults)
    return num_classes, shape


def load_data(cfg: DataConfig, *, seed: int, device: torch.device | str) -> DataBundle:
    """Read, check and split the data set `cfg.name`; `seed` chooses the validation images (and `train_images`), nothing else.

    Raises `UserError` with one sentence where files are missing, truncated or corrupt, or labels or sizes are impossible.
    """
    describe(cfg)
    return DATASETS[cfg.name].load(cfg, seed, torch.device(device))
