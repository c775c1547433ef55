"""Oracle: images of one flat colour per class, written as PNG and JPEG; every fault of a folder is one sentence that names a file."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from compress.config import DataConfig
from compress.data import describe, load_data
from compress.errors import RunError, UserError

COLOURS = {"blue": (10, 20, 200), "green": (30, 220, 40), "red": (250, 0, 60)}
SIDE = 12


def write(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture(scope="module")
def folder_template(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for name, colour in COLOURS.items():
        for number in range(6):
            write(root / "train" / name / f"{number}.png", colour, (14 + number, 20))
        write(root / "val" / name / "deeper" / "0.png", colour)
        (root / "val" / name / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def tiny_template(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    lines = []
    for number, colour in enumerate(COLOURS.values()):
        for image in range(5):
            write(root / "train" / f"n{number}" / "images" / f"n{number}_{image}.JPEG", colour, (64, 64))
        write(root / "val" / "images" / f"val_{number}.JPEG", colour, (64, 64))
        lines.append(f"val_{number}.JPEG\tn{number}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n0\nn1\nn2\n")
    return root


@pytest.fixture
def folder(folder_template, tmp_path):
    return Path(shutil.copytree(folder_template, tmp_path / "images"))


@pytest.fixture
def tiny(tiny_template, tmp_path):
    return Path(shutil.copytree(tiny_template, tmp_path / "tiny-imagenet-200"))


def config(root: Path, name: str = "image_folder", **settings) -> DataConfig:
    return DataConfig(name=name, root=root, **{"image_size": SIDE, "workers": 0, "val_fraction": 0.34, **settings})


def load(*arguments, **settings):
    return load_data(config(*arguments, **settings), seed=0, device="cpu")


def fault(*arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_image_folder_gives_its_colours_and_classes(folder):
    data = load(folder, mean=[0, 0, 0], std=[1, 1, 1])
    assert describe(config(folder)) == (data.num_classes, data.input_shape) == (3, (3, SIDE, SIDE))
    assert (len(data.train), len(data.val), len(data.test)) == (12, 6, 3)
    assert torch.bincount(data.val.labels).tolist() == [2, 2, 2]
    colours = torch.tensor(list(COLOURS.values())) / 255
    for part in (data.train, data.val, data.test):
        for x, y in part.batches(4):
            assert x.shape[1:] == (3, SIDE, SIDE)
            torch.testing.assert_close(x, colours[y].view(-1, 3, 1, 1).expand_as(x))


def test_statistics_come_from_the_training_images(folder):
    data = load(folder)
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float64) / 255
    assert data.mean == pytest.approx(colours.mean(0).tolist()) and data.std == pytest.approx(colours.std(0, unbiased=False).tolist())


def test_workers_and_processes_change_nothing(folder):
    def epoch(workers: int, **options):
        torch.manual_seed(workers)
        split = load(folder, workers=workers, crop_padding=2).train
        before = torch.get_rng_state()
        batches = list(split.batches(5, generator=torch.Generator().manual_seed(1), augment=True, shuffle=True, **options))
        assert torch.equal(before, torch.get_rng_state())
        return batches

    alone, shares = epoch(0), [epoch(0, rank=rank, world_size=3) for rank in range(3)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shares, strict=True)]
    for other in (epoch(2), joined):
        for (x, y), (again, labels) in zip(alone, other, strict=True):
            assert torch.equal(x, again) and torch.equal(y, labels)
    assert torch.equal(epoch(0, start=2)[0][0], alone[2][0])


def test_grey_and_transparent_images_become_rgb(folder):
    Image.new("L", (9, 30), 77).save(folder / "val" / "red" / "deeper" / "0.png")
    Image.new("RGBA", (40, 13), (1, 2, 3, 0)).save(folder / "val" / "blue" / "deeper" / "0.png")
    data = load(folder, mean=[0, 0, 0], std=[1, 1, 1])
    ((x, y),) = data.test.batches(3)
    assert torch.equal(x[2], torch.full((3, SIDE, SIDE), 77 / 255)) and y.tolist() == [0, 1, 2]


def test_a_test_folder_goes_before_val(folder):
    shutil.copytree(folder / "val", folder / "test")
    write(folder / "test" / "red" / "1.png", COLOURS["red"])
    assert len(load(folder).test) == 4


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "train" / "red" / "3.png").write_bytes(b""), "red/3.png is empty"),
        (lambda root: (root / "train" / "red" / "3.png").write_bytes(b"no image at all"), "red/3.png cannot be read"),
        (lambda root: truncate(root / "val" / "green" / "deeper" / "0.png", 0.7), "deeper/0.png cannot be read"),
        (lambda root: shutil.rmtree(root / "val"), "neither test nor val"),
        (lambda root: shutil.rmtree(root / "train"), "train is missing"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in ("red", "blue")], "has 1 class folder"),
        (lambda root: [path.unlink() for path in (root / "train" / "red").iterdir()], "train/red holds no image"),
        (lambda root: (root / "val" / "red").rename(root / "val" / "rot"), "rot has no counterpart"),
        (lambda root: [path.unlink() for path in root.glob("train/*/*.png") if path.stem != "0"], "No validation image"),
    ],
)
def test_damaged_folders_are_found_before_training(folder, damage, said):
    damage(folder)
    assert said in fault(folder)


def test_damage_inside_an_image_is_one_sentence_when_it_is_decoded(folder):
    data = load(folder, mean=[0, 0, 0], std=[1, 1, 1], workers=1)
    path = folder / "val" / "red" / "deeper" / "0.png"
    path.write_bytes(path.read_bytes()[:30] + b"IEND")
    with pytest.raises(RunError, match="red/deeper/0.png cannot be read") as error:
        list(data.test.batches(3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet_in_either_root(tiny, above):
    data = load(tiny.parent if above else tiny, "tiny_imagenet", image_size=None, mean=[0, 0, 0], std=[1, 1, 1], val_fraction=0.2)
    assert (data.num_classes, data.input_shape, len(data.train), len(data.val), len(data.test)) == (3, (3, 64, 64), 12, 3, 3)
    colours = torch.tensor(list(COLOURS.values())) / 255
    for x, y in data.test.batches(2):
        # JPEG keeps a flat colour up to its rounding.
        torch.testing.assert_close(x, colours[y].view(-1, 3, 1, 1).expand_as(x), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "val" / "val_annotations.txt").unlink(), "val_annotations.txt is missing"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9\n"), "Line 1 of"),
        (lambda root: (root / "val" / "images" / "val_1.JPEG").unlink(), "val_1.JPEG is missing"),
        (lambda root: shutil.rmtree(root / "train" / "n2"), "train/n2 is missing"),
        (lambda root: (root / "train" / "n1" / "images" / "n1_4.JPEG").unlink(), "class n1 has 4 images"),
        (lambda root: truncate(root / "train" / "n1" / "images" / "n1_4.JPEG", 0.6), "n1_4.JPEG cannot be read"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text(""), "has 0 images|are empty"),
    ],
)
def test_damaged_tiny_imagenet_is_found_before_training(tiny, damage, said):
    damage(tiny)
    sentence = fault(tiny, "tiny_imagenet")
    assert any(part in sentence for part in said.split("|"))
