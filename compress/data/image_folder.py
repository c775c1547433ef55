"""Folders of images: `root/train/<class>/...` and `root/test/<class>/...` (or `root/val` where there is no `root/test`).

The classes are the subfolders of `root/train` in the order of their names; images may lie deeper. The held-out folder is the test set: it
is only reported, and the validation images are taken from the training images. Mean and standard deviation are measured on training images.
"""

from __future__ import annotations

from pathlib import Path

import torch

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, make_transform, resolve_root, split_bundle
from compress.data.folder_split import SUFFIXES, FolderSplit, check_images, measured_statistics
from compress.errors import UserError

_SIDE = 224
Labelled = tuple[list[Path], torch.Tensor]


def class_names(folder: Path) -> list[str]:
    """The names of the subfolders of `folder`, sorted; raises `UserError` for fewer than two."""
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is missing; the images are expected in {folder}/<class>/.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"The folder {folder} has {len(names)} class folder(s); at least 2 are needed.")
    return names


def images_below(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def labelled_images(folder: Path, classes: list[str]) -> Labelled:
    """Image files below `folder/<class>` and their class numbers; raises `UserError` for unknown or empty classes."""
    paths: list[Path] = []
    labels: list[int] = []
    for name in class_names(folder):
        if name not in classes:
            raise UserError(f"The class folder {folder / name} has no counterpart among the {len(classes)} training classes.")
        found = images_below(folder / name)
        if not found:
            raise UserError(f"The class folder {folder / name} holds no image ({', '.join(sorted(SUFFIXES))}).")
        paths += found
        labels += [classes.index(name)] * len(found)
    return paths, torch.tensor(labels)


def folder_bundle(
    cfg: DataConfig, seed: int, device: torch.device, train: Labelled, test: Labelled, num_classes: int, side: int
) -> DataBundle:
    """Check all files, measure the statistics that `cfg` does not give, and split."""
    check_images(train[0] + test[0], max(1, cfg.workers))
    mean, std = ((0.0,) * 3, (1.0,) * 3) if cfg.mean is not None and cfg.std is not None else measured_statistics(train[0], side)
    transform = make_transform(cfg, mean, std, padding=side // 8, flip=True)
    whole, held = (FolderSplit(*part, transform, device, side, cfg.workers) for part in (train, test))
    return split_bundle(cfg, seed, whole, held, num_classes, (3, side, side))


class ImageFolder:
    """Any images sorted into folders, see the module docstring."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        side = cfg.image_size or _SIDE
        return len(class_names(resolve_root(cfg) / "train")), (3, side, side)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        root = resolve_root(cfg)
        classes = class_names(root / "train")
        held = root / "test" if (root / "test").is_dir() else root / "val"
        if not held.is_dir():
            raise UserError(f"The folder {root} has neither test nor val beside train; test images are needed in one of them.")
        train, test = labelled_images(root / "train", classes), labelled_images(held, classes)
        return folder_bundle(cfg, seed, device, train, test, len(classes), cfg.image_size or _SIDE)


DATASETS.register("image_folder")(ImageFolder())
