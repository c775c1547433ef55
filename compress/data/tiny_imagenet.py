"""Tiny-ImageNet (Stanford CS231N) as it is unpacked: 200 classes, 500 training and 50 test images of 3 x 64 x 64 each.

    tiny-imagenet-200/wnids.txt                          the classes (optional)
    tiny-imagenet-200/train/<class>/images/*.JPEG
    tiny-imagenet-200/val/images/*.JPEG, val_annotations.txt     image and class per line, tab-separated

`root` is this folder or the one that holds it. The labelled `val` images are the test set here; the validation images are taken from the
training images. Every class must have equally many images, so that an archive that was unpacked in part is noticed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, resolve_root
from compress.data.image_folder import Labelled, class_names, folder_bundle, labelled_images
from compress.errors import UserError

_SIDE = 64
_FOLDER = "tiny-imagenet-200"


def _folder(cfg: DataConfig) -> Path:
    root = resolve_root(cfg)
    return root / _FOLDER if (root / _FOLDER).is_dir() else root


def _classes(folder: Path) -> list[str]:
    names = class_names(folder / "train")
    listed = folder / "wnids.txt"
    if listed.is_file():
        missing = sorted(set(listed.read_text(encoding="utf-8").split()) - set(names))
        if missing:
            raise UserError(f"The folder {folder / 'train' / missing[0]} is missing, though {listed} lists it; unpack the archive again.")
    return names


def _annotated(folder: Path, classes: list[str]) -> Labelled:
    """The test images of `val_annotations.txt` and their class numbers."""
    listed = folder / "val" / "val_annotations.txt"
    if not listed.is_file():
        raise UserError(f"The file {listed} is missing; unpack the archive again.")
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(listed.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in numbers:
            raise UserError(f"Line {number} of {listed} names no image of a training class; unpack the archive again.")
        path = folder / "val" / "images" / fields[0]
        if not path.is_file():
            raise UserError(f"The image {path} is missing, though {listed} lists it; unpack the archive again.")
        paths.append(path)
        labels.append(numbers[fields[1]])
    return paths, torch.tensor(labels, dtype=torch.int64)


def _check_balance(labelled: Labelled, classes: list[str], folder: Path) -> None:
    counts = torch.bincount(labelled[1], minlength=len(classes))
    class_, fewest, most = classes[int(counts.argmin())], int(counts.min()), int(counts.max())
    if fewest != most:
        raise UserError(f"The class {class_} has {fewest} images in {folder} and others have {most}; unpack the archive again.")


class TinyImageNet:
    """Tiny-ImageNet, see the module docstring."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        side = cfg.image_size or _SIDE
        return len(_classes(_folder(cfg))), (3, side, side)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        folder = _folder(cfg)
        classes = _classes(folder)
        train, test = labelled_images(folder / "train", classes), _annotated(folder, classes)
        _check_balance(train, classes, folder / "train")
        _check_balance(test, classes, folder / "val")
        return folder_bundle(cfg, seed, device, train, test, len(classes), cfg.image_size or _SIDE)


DATASETS.register("tiny_imagenet")(TinyImageNet())
