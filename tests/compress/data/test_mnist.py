"""Oracle: torchvision's reader on the same files, and the bytes that were written; faults are one sentence."""

import gzip
import re

import pytest
import torch
from torchvision import datasets

from compress.config import DataConfig
from compress.data import describe, load_data
from compress.errors import UserError

COUNTS = {"train": 60, "t10k": 20}


def header(*shape):
    return b"\0\0\x08" + bytes([len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def write(folder, packed=False):
    """60 and 20 random images in idx files, six and two of each class."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in COUNTS.items():
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8).numpy().tobytes()
        for name, content in (
            (f"{part}-images-idx3-ubyte", header(count, 28, 28) + images),
            (f"{part}-labels-idx1-ubyte", header(count) + bytes(range(10)) * (count // 10)),
        ):
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def load(root, **settings):
    return load_data(DataConfig(name="mnist", root=root, **settings), seed=0, device="cpu")


def fault(root, **settings):
    with pytest.raises(UserError) as error:
        load(root, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("place", "packed"), [("MNIST/raw", False), ("MNIST/raw", True), (".", True), ("MNIST", False)])
def test_every_place_and_packing(tmp_path, place, packed):
    write(tmp_path / place, packed)
    data = load(tmp_path, val_fraction=0)
    assert (len(data.train), len(data.test), data.num_classes, data.input_shape) == (60, 20, 10, (1, 28, 28))
    assert describe(DataConfig(name="mnist")) == (10, (1, 28, 28))
    assert data.train.labels.tolist() == list(range(10)) * 6
    assert (data.train.transform.padding, data.train.transform.flip) == (0, False)


def test_images_are_those_of_torchvisions_reader(tmp_path):
    write(tmp_path / "MNIST/raw")
    data = load(tmp_path, val_fraction=0)
    for split, train in ((data.train, True), (data.test, False)):
        expected = datasets.MNIST(str(tmp_path), train=train, download=False)
        assert torch.equal(split.images, expected.data.unsqueeze(1)) and torch.equal(split.labels, expected.targets)
    x, _ = next(iter(data.test.batches(20)))
    torch.testing.assert_close(x, (expected.data.unsqueeze(1) / 255 - 0.1307) / 0.3081, atol=1e-5, rtol=0)


def test_faults(tmp_path):
    folder = write(tmp_path)
    labels, images = folder / "t10k-labels-idx1-ubyte", folder / "train-images-idx3-ubyte"
    whole = labels.read_bytes()
    assert "not downloaded" in fault(tmp_path, download=True)
    for content, said in (
        (whole[:-1], "holds 19 bytes, but its header says 20 = 20"),
        (b"", "no header"),
        (b"\0\0\x0d" + whole[3:], "no header"),
        (header(10) + bytes(range(10)), "has 10 labels for 20 images"),
        (whole[:-1] + b"\x0a", "10"),
    ):
        labels.write_bytes(content)
        assert re.search(said, fault(tmp_path)), said
    labels.unlink()
    assert "neither in" in fault(tmp_path) and "t10k-labels-idx1-ubyte" in fault(tmp_path)
    (folder / f"{labels.name}.gz").write_bytes(gzip.compress(whole)[:-3])
    assert "cannot be read" in fault(tmp_path)
    images.write_bytes(header(60, 8, 8) + bytes(60 * 64))
    assert "instead of 28 x 28" in fault(tmp_path)
