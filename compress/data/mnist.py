"""MNIST (LeCun, Cortes and Burges 1998) from its four idx files: 60,000 training and 10,000 test images of 1 x 28 x 28, 10 classes.

    train-images-idx3-ubyte   train-labels-idx1-ubyte   t10k-images-idx3-ubyte   t10k-labels-idx1-ubyte

each as it is or with .gz behind its name, in `root`, `root/MNIST` or `root/MNIST/raw` (torchvision's place); nothing is downloaded. An idx
file is a header of big-endian 32-bit numbers, 0x08NN for N dimensions of bytes and then their sizes, and the bytes. Sizes are checked
against the headers, and images against labels. Mean and standard deviation are those of the 60,000 training images; digits are
neither cropped nor mirrored.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, make_transform, resolve_root, tensor_bundle
from compress.errors import UserError

_CLASSES, _SIDE = 10, 28
_MEAN, _STD = (0.1307,), (0.3081,)
_PLACES = (".", "MNIST", "MNIST/raw")


def find(root: Path, name: str) -> Path:
    """The file `name` or `name`.gz below `root`; raises `UserError` where there is none."""
    for place in _PLACES:
        for path in (root / place / name, root / place / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(f"The file {name} (or {name}.gz) is neither in {root} nor in {root / 'MNIST/raw'}; MNIST is read from local files only.")


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file as uint8 tensor of the shape in its header; raises `UserError` where content and header disagree."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"The file {path} cannot be read ({error}); copy it again.") from error
    dims = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * dims
    if content[:3] != b"\0\0\x08" or not dims or len(content) < start:
        raise UserError(f"The file {path} has no header of an idx file of bytes; copy it again.")
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dims)]
    size = int(np.prod(shape, dtype=object))
    if len(content) - start != size:
        sizes = " x ".join(map(str, shape))
        raise UserError(f"The file {path} holds {len(content) - start} bytes, but its header says {sizes} = {size}; copy it again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


class Mnist:
    """MNIST, see the module docstring."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        return _CLASSES, (1, _SIDE, _SIDE)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        if cfg.download:
            raise UserError("MNIST is read from local files and not downloaded; put its idx files into data.root and set data.download to false.")
        root = resolve_root(cfg)
        parts = [self._part(root, part) for part in ("train", "t10k")]
        transform = make_transform(cfg, _MEAN, _STD, padding=0, flip=False)
        return tensor_bundle(cfg, seed, device, parts[0], parts[1], _CLASSES, transform)

    def _part(self, root: Path, part: str) -> tuple[Tensor, Tensor]:
        files = find(root, f"{part}-images-idx3-ubyte"), find(root, f"{part}-labels-idx1-ubyte")
        images, labels = (read_idx(path) for path in files)
        if images.dim() != 3 or tuple(images.shape[1:]) != (_SIDE, _SIDE):
            raise UserError(f"The file {files[0]} holds images of {tuple(images.shape[1:])} instead of 28 x 28 pixels.")
        if labels.dim() != 1 or len(labels) != len(images):
            raise UserError(f"The file {files[1]} has {len(labels)} labels for {len(images)} images in {files[0].name}.")
        return images.unsqueeze(1), labels.long()


DATASETS.register("mnist")(Mnist())
