"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in torchvision's layout: 50,000 training and 10,000 test images of 3 x 32 x 32.

torchvision compares every file with its MD5 sum before it is read. Means and standard deviations are those of the 50,000 training
images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, make_transform, resolve_root, tensor_bundle
from compress.errors import UserError


class Cifar:
    """One of the two data sets, by its class in torchvision and its statistics."""

    def __init__(self, kind: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.kind, self.num_classes, self.mean, self.std = kind, num_classes, mean, std

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        return self.num_classes, (3, 32, 32)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        root = resolve_root(cfg, create=cfg.download)
        train, test = self._read(cfg, root, True), self._read(cfg, root, False)
        transform = make_transform(cfg, self.mean, self.std, padding=4, flip=True)
        return tensor_bundle(cfg, seed, device, train, test, self.num_classes, transform)

    def _read(self, cfg: DataConfig, root: Path, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision import datasets

        kind = getattr(datasets, self.kind)
        try:
            read = kind(str(root), train=train, download=cfg.download)
        except Exception as error:
            raise UserError(self._fault(cfg, root, kind, error)) from error
        return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets)

    def _fault(self, cfg: DataConfig, root: Path, kind: type, error: Exception) -> str:
        from torchvision.datasets.utils import check_integrity

        folder = root / kind.base_folder
        if cfg.download:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"The data set {cfg.name!r} could not be downloaded into {root} ({reason})."
        advice = "point data.root or COMPRESS_DATA to the folder that holds it, or set data.download to true"
        if not folder.is_dir():
            return f"The data set {cfg.name!r} was not found: there is no folder {folder}; {advice}."
        for name, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
            if not (folder / name).is_file():
                return f"The data set {cfg.name!r} is incomplete: {folder / name} is missing; {advice}."
            if not check_integrity(str(folder / name), md5):
                return f"The data set {cfg.name!r} is damaged: {folder / name} does not have the MD5 sum {md5}; delete it and {advice}."
        return f"The data set {cfg.name!r} in {root} could not be read ({type(error).__name__}: {error}); {advice}."


DATASETS.register("cifar10")(Cifar("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
DATASETS.register("cifar100")(Cifar("CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))
