"""Oracle: scikit-learn's digits themselves, files written in the published formats, and MD5 or CRC sums; faults are one sentence."""

import gzip
import os
import pickle
import re
from hashlib import md5

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from compress.config import DataConfig
from compress.data import DATASETS, describe, load_data
from compress.data.transforms import channel_statistics
from compress.errors import UserError


def load(**settings):
    seed = settings.pop("seed", 0)
    return load_data(DataConfig(**settings), seed=seed, device="cpu")


def fault(**settings) -> str:
    with pytest.raises(UserError) as error:
        load(**settings)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_digits_are_all_of_scikit_learn_and_parts_do_not_overlap():
    data = load()
    pixels, targets = load_digits(return_X_y=True)
    levels = np.round(pixels * 255 / 16).astype(int)
    expected = sorted(zip(map(tuple, levels.tolist()), targets.tolist(), strict=True))
    found = []
    for part in (data.train, data.val, data.test):
        found += zip(map(tuple, part.images.flatten(1).tolist()), part.labels.tolist(), strict=True)
    assert sorted(found) == expected
    assert (len(data.train) + len(data.val), len(data.val), len(data.test)) == (1437, 144, 360)
    assert torch.bincount(data.test.labels).tolist() == pytest.approx((np.bincount(targets) * 360 / 1797).tolist(), abs=1)


def test_only_the_validation_images_depend_on_the_seed():
    first, again, other = load(), load(), load(seed=1)
    assert torch.equal(first.val.images, again.val.images) and torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert torch.equal(first.test.images, other.test.images)
    assert (first.mean, first.std) == (other.mean, other.std)


def test_digits_statistics_are_those_of_the_training_images():
    data = load(val_fraction=0)
    assert (len(data.val), len(data.train)) == (0, 1437)
    x = torch.cat([x for x, _ in data.train.batches(500)]).double()
    assert x.mean().item() == pytest.approx(0, abs=1e-6) and x.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_describe_agrees_with_what_is_loaded():
    data = load(train_images=50)
    assert describe(DataConfig()) == (data.num_classes, data.input_shape) == (10, (1, 8, 8))
    assert len(data.train) == 50 and torch.bincount(data.train.labels).tolist() == pytest.approx([5] * 10, abs=1)


def test_calibration_draws_distinct_training_images_without_augmentation():
    data = load(crop_padding=2, flip=True)
    batches = data.calibration(100, 32, torch.Generator().manual_seed(0))
    assert [len(y) for _, y in batches] == [32, 32, 32, 4]
    known = {tuple(x.flatten().tolist()) for x, _ in data.train.batches(1) for x in x}
    drawn = [tuple(x.flatten().tolist()) for x, _ in batches for x in x]
    assert set(drawn) <= known and len(drawn) == 100
    assert len(torch.cat([y for _, y in data.calibration(10**6, 500, torch.Generator())])) == len(data.train)


def test_recalibration_draws_crops_and_flips_of_the_calibration_images():
    """Every image is one of the 2 x 25 views of its calibration image, black outside; without augmentation it is that image."""
    data, plain = load(crop_padding=2, flip=True), load(crop_padding=0, flip=False)
    seed = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    black = torch.tensor([(0 - mean) / std for mean, std in zip(data.mean, data.std, strict=True)])[:, None, None]
    moved = 0
    for (x, y), (seen, labels) in zip(data.calibration(40, 16, seed()), data.recalibration(40, 16, seed()), strict=True):
        assert torch.equal(y, labels)
        for image, view in zip(x, seen, strict=True):
            wide = black.expand(-1, 12, 12).clone()
            wide[:, 2:10, 2:10] = image
            views = [wide[:, i:i + 8, j:j + 8] for i in range(5) for j in range(5)]
            assert any(torch.allclose(view, side, atol=1e-5) for crop in views for side in (crop, crop.flip(-1)))
            moved += not torch.equal(view, image)
    assert moved > 30
    for (x, _), (seen, _) in zip(plain.calibration(40, 16, seed()), plain.recalibration(40, 16, seed()), strict=True):
        assert torch.equal(x, seen)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean": [0.1, 0.2]}, "data.mean has 2 values, but digits has 1 channel"),
        ({"train_images": 1294}, "has 1293 training images after the split"),
        ({"name": "cifar10"}, "set data.root or the environment variable COMPRESS_DATA"),
        ({"name": "fashion_mnist", "root": "/nowhere"}, "/nowhere given by data.root .* does not exist"),
    ],
)
def test_wrong_settings(settings, said, monkeypatch):
    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    assert re.search(said, fault(**settings))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 in small: 5 training files of 8 images and one of 10, with the MD5 sums that torchvision is told to expect."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    sums = []
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        count = 8 if name != "test_batch" else 10
        labels = [(number * 8 + row) % 10 for row in range(count)]
        content = pickle.dumps({"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": labels})
        (folder / name).write_bytes(content)
        sums.append([name, md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": [str(number) for number in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(meta).hexdigest()})
    return tmp_path


def test_cifar_is_read_in_the_order_of_its_planes(cifar, monkeypatch):
    monkeypatch.setenv("COMPRESS_DATA", str(cifar))
    data = load(name="cifar10", val_fraction=0)
    stored = [pickle.loads((cifar / "cifar-10-batches-py" / f"data_batch_{number}").read_bytes()) for number in range(1, 6)]
    assert torch.equal(data.train.images, torch.from_numpy(np.vstack([part["data"] for part in stored]).reshape(-1, 3, 32, 32)))
    assert data.train.labels.tolist() == sum((part["labels"] for part in stored), [])
    assert (len(data.test), data.input_shape, data.train.transform.padding, data.train.transform.flip) == (10, (3, 32, 32), 4, True)


def test_cifar_faults_name_the_file(cifar):
    folder = cifar / "cifar-10-batches-py"
    batch = folder / "data_batch_3"
    whole = batch.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"x", b""):
        batch.write_bytes(damaged)
        sentence = fault(name="cifar10", root=cifar)
        assert "damaged" in sentence and str(batch) in sentence
    batch.unlink()
    assert f"{batch} is missing" in fault(name="cifar10", root=cifar)
    assert "no folder" in fault(name="cifar100", root=cifar)


@pytest.fixture
def fashion(tmp_path):
    """Black images in files of the right sizes, balanced labels."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28)) + bytes(count * 784)
        labels = b"".join(number.to_bytes(4, "big") for number in (0x801, count)) + bytes(range(10)) * (count // 10)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_fashion_mnist_and_its_faults(fashion):
    folder = fashion / "FashionMNIST" / "raw"
    data = load(name="fashion_mnist", root=fashion)
    assert (len(data.train), len(data.val), len(data.test), data.input_shape) == (54_000, 6_000, 10_000, (1, 28, 28))
    assert torch.bincount(data.val.labels).tolist() == [600] * 10
    labels = folder / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    (folder / f"{labels.name}.gz").write_bytes(gzip.compress(whole[:-1] + b"\x08"))
    assert f"{labels} differs from" in fault(name="fashion_mnist", root=fashion)
    (folder / f"{labels.name}.gz").unlink()
    for end, said in ((b"", "has 10007 bytes instead of 10008"), (b"\x0a", "damaged"), (b"\x08", "damaged")):
        labels.write_bytes(whole[:-1] + end)
        assert said in fault(name="fashion_mnist", root=fashion)
    labels.unlink()
    assert f"{labels} is missing" in fault(name="fashion_mnist", root=fashion)


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    assert "could not be downloaded" in fault(name="cifar10", root=tmp_path / "new", download=True)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fault(name="cifar10", root=tmp_path / "file", download=True)


def test_every_data_set_that_the_configuration_describes_is_registered():
    described = DataConfig.model_fields["name"].description
    assert all(name in described for name in DATASETS.names())
    assert DATASETS.names() == ["cifar10", "cifar100", "digits", "fashion_mnist", "image_folder", "mnist", "tiny_imagenet"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_real_cifar_has_the_stated_statistics(name, folder):
    root = os.environ.get("COMPRESS_DATA", "")
    if not os.path.isdir(os.path.join(root, folder)):
        pytest.skip("COMPRESS_DATA does not hold this data set")
    data = load(name=name, val_fraction=0)
    mean, std = channel_statistics(data.train.images)
    assert mean == pytest.approx(data.mean, abs=1e-4) and std == pytest.approx(data.std, abs=1e-4)
    assert torch.bincount(data.test.labels).unique().tolist() == [10_000 // data.num_classes]
