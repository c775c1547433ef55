"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) in torchvision's layout: 60,000 training and 10,000 test images of 1 x 28 x 28.

torchvision checks only that the unpacked files exist. Here their exact sizes are checked before reading, and afterwards that every class
has its tenth of the labels; where the compressed file lies beside an unpacked one, the latter must have the CRC-32 that the former records.
Mean and standard deviation are those of the 60,000 training images.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, make_transform, resolve_root, tensor_bundle
from compress.errors import UserError

_CLASSES, _SIDE = 10, 28
_IMAGES = {"train": 60_000, "t10k": 10_000}
_MEAN, _STD = (0.2860,), (0.3530,)


def _expected_sizes() -> dict[str, int]:
    sizes = {}
    for part, count in _IMAGES.items():
        sizes[f"{part}-images-idx3-ubyte"] = 16 + count * _SIDE * _SIDE
        sizes[f"{part}-labels-idx1-ubyte"] = 8 + count
    return sizes


class FashionMnist:
    """Fashion-MNIST, see the module docstring."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        return _CLASSES, (1, _SIDE, _SIDE)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        from torchvision.datasets import FashionMNIST

        root = resolve_root(cfg, create=cfg.download)
        if cfg.download:
            try:
                FashionMNIST(str(root), download=True)
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"The data set {cfg.name!r} could not be downloaded into {root} ({reason}).") from error
        folder = root / "FashionMNIST" / "raw"
        for name, size in _expected_sizes().items():
            _check_file(folder / name, size)
        parts = []
        for train in (True, False):
            try:
                read = FashionMNIST(str(root), train=train)
            except Exception as error:
                raise UserError(f"The data set in {folder} could not be read ({error}); download it again.") from error
            parts.append(self._checked(read.data.unsqueeze(1), read.targets.long(), folder))
        transform = make_transform(cfg, _MEAN, _STD, padding=4, flip=True)
        return tensor_bundle(cfg, seed, device, parts[0], parts[1], _CLASSES, transform)

    def _checked(self, images: Tensor, labels: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(labels, minlength=_CLASSES)
        if len(counts) != _CLASSES or not bool((counts == len(labels) // _CLASSES).all()):
            share = len(labels) // _CLASSES
            raise UserError(f"The labels in {folder} are damaged: each of {_CLASSES} classes should have {share} images; download them.")
        return images, labels


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        advice = "point data.root or COMPRESS_DATA to the folder that holds FashionMNIST/raw, or set data.download to true"
        raise UserError(f"The file {path} is missing; {advice}.")
    if path.stat().st_size != size:
        raise UserError(f"The file {path} has {path.stat().st_size} bytes instead of {size}; delete it and set data.download to true.")
    packed = path.with_name(path.name + ".gz")
    if packed.is_file() and packed.stat().st_size > 18:
        with open(packed, "rb") as file:
            file.seek(-8, 2)
            recorded = int.from_bytes(file.read(4), "little")
        if zlib.crc32(path.read_bytes()) != recorded:
            raise UserError(f"The file {path} differs from what {packed.name} beside it holds; delete both and set data.download to true.")


DATASETS.register("fashion_mnist")(FashionMnist())
