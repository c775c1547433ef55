"""scikit-learn's embedded digits: 1,797 handwritten digits of 8 x 8 pixels, 10 classes, no files and no download.

Grey levels 0..16 become round(level * 255 / 16). 360 test images, evenly spaced within each class, do not depend on any seed; the other
1,437 are the training images. Mean and standard deviation are measured on the latter.
"""

from __future__ import annotations

import torch

from compress.config import DataConfig
from compress.data import DATASETS
from compress.data.bundle import DataBundle, Shape, make_transform, tensor_bundle
from compress.data.stratify import stratified
from compress.data.transforms import channel_statistics

TEST_IMAGES = 360


class Digits:
    """The embedded digits, see the module docstring."""

    def describe(self, cfg: DataConfig) -> tuple[int, Shape]:
        return 10, (1, 8, 8)

    def load(self, cfg: DataConfig, seed: int, device: torch.device) -> DataBundle:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        labels = torch.from_numpy(targets).long()
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[stratified(labels, TEST_IMAGES)] = True
        mean, std = channel_statistics(images[~test])
        transform = make_transform(cfg, mean, std, padding=0, flip=False)
        return tensor_bundle(cfg, seed, device, (images[~test], labels[~test]), (images[test], labels[test]), 10, transform)


DATASETS.register("digits")(Digits())
