"""Oracles: conservation laws, exact counts and identities between arms, on the embedded digits through the command line."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from compress.experiments.at_init import main
from compress.experiments.at_init_settings import AtInitConfig, arguments, settings_of
from compress.experiments.base import main_guard
from compress.experiments.settings import load_settings
from compress.siblings import own
from tests.compress.data.test_mnist import write

CONFIGS = Path(__file__).parents[3] / "configs/at_init"
TOTAL = 72 + 576 + 8 * 64 * 10


def command(folder, *flags):
    return main_guard(main, ["--config_path", str(CONFIGS / "digits.json"), "--output_dir", str(folder), *flags])


def rows(folder, name="at-init-digits"):
    return json.loads((folder / name / "results.json").read_text())["rows"]


def test_singleshot(tmp_path):
    assert command(tmp_path) == 0
    found = {(row["pruner"], row["compression_ratio"]): row for row in rows(tmp_path)}
    assert len(found) == 10
    for (pruner, ratio), row in found.items():
        assert row["kept"] == (TOTAL if ratio == 1 else -(-TOTAL // 10)) and row["density"] == row["kept"] / TOTAL
        assert row["flops"] == 2 * row["macs_nonzero"]
        assert (row["mac_fraction"] == 1) == (ratio == 1) and 0 < row["mac_fraction"] <= 1
        for name, panel in row["histograms"]["trained"].items():
            layer = next(layer for layer in row["structure"]["layers"] if layer["name"] == name)
            assert sum(panel["counts"]) == layer["kept"] and len(panel["edges"]) == len(panel["counts"]) + 1
    # Without pruning nothing distinguishes the criteria but magnitude's training before it.
    assert len({found[pruner, 1]["accuracy"] for pruner in ("random", "snip", "grasp", "synflow")}) == 1
    assert found["magnitude", 1]["accuracy_pruned"] > found["random", 1]["accuracy_pruned"]
    folder = tmp_path / "at-init-digits"
    names = {"accuracy", "test_seconds", "flops", "mac_fraction", "layer_sparsity", "layer_macs"}
    names |= {f"weights-{pruner}" for pruner, _ in found}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == names
    text = (folder / "tables.md").read_text()
    assert all(title in text for title in ("## Test accuracy", "## Test time", "## FLOPs")) and "| 10x |" in text
    assert len((folder / "layers.csv").read_text().splitlines()) == 1 + 5 * 3


def test_ablations_keep_layer_densities(tmp_path):
    flags = ["--pruner", "magnitude", "--compression-ratio", "5", "--post-epochs", "0", "--pre-epochs", "0"]
    densities = {}
    for ablation in ("shuffle", "reinitialize", "invert"):
        assert command(tmp_path, *flags, "--expid", ablation, f"--{ablation}", "true") == 0
        densities[ablation] = [layer["density"] for layer in rows(tmp_path, ablation)[0]["structure"]["layers"]]
    assert command(tmp_path, *flags, "--expid", "plain") == 0
    plain = rows(tmp_path, "plain")[0]
    assert densities["shuffle"] == densities["reinitialize"] == [layer["density"] for layer in plain["structure"]["layers"]]
    assert densities["invert"] != densities["shuffle"] and rows(tmp_path, "invert")[0]["kept"] == plain["kept"]


def test_multishot_rewinds_and_counts(tmp_path):
    flags = ["--experiment", "multishot", "--pruner", "magnitude", "--level-list", "1", "2", "--compression-ratio", "4"]
    assert command(tmp_path, *flags, "--set", "dense_classifier=true") == 0
    one, two = rows(tmp_path)
    assert [len(row["densities"]) for row in (one, two)] == [1, 2]
    assert one["kept"] == two["kept"] == 162 and two["densities"] == [0.5, 0.25]
    assert [layer["name"] for layer in one["structure"]["layers"]] == ["0.weight", "2.weight"]


def test_conservation(tmp_path):
    assert command(tmp_path, "--experiment", "unit-conservation", "--expid", "unit", "--pruner-list", "synflow", "mag") == 0
    synflow, magnitude = rows(tmp_path, "unit")
    assert synflow["largest_relative_gap"] < 1e-12 and magnitude["largest_relative_gap"] > 1e-2
    assert [len(layer[0]) for layer in synflow["units"]] == [8, 8]
    assert command(tmp_path, "--experiment", "layer-conservation", "--expid", "layer", "--pruner", "synflow") == 0
    layers = rows(tmp_path, "layer")[0]["layers"]
    constant = [layer["average"] / layer["inverse_size"] for layer in layers]
    assert max(constant) / min(constant) - 1 < 1e-12
    flags = ["--experiment", "schedule-conservation", "--pruner", "synflow", "--compression-ratio", "100", "--prune-epoch-list", "1", "20"]
    assert command(tmp_path, *flags, "--expid", "schedule") == 0
    shares = {(row["schedule"], row["iterations"]): row["largest_share"] for row in rows(tmp_path, "schedule")}
    assert shares["linear", 1] == shares["geometric", 1] > shares["geometric", 20] and shares["linear", 20] > shares["geometric", 20]
    assert command(tmp_path, "--experiment", "imp-conservation", "--expid", "imp", "--post-epochs", "2") == 0
    figures = {name: {path.stem for path in (tmp_path / name / "figures").glob("*.png")} for name in ("unit", "layer", "schedule", "imp")}
    assert figures["unit"] == {"units-synflow", "units-magnitude"} and figures["layer"] == {"layers-synflow"}
    assert figures["schedule"] == {"schedules-synflow"} and figures["imp"] == {"layers", "course"}
    points = list(csv.DictReader((tmp_path / "unit/units.csv").open()))
    assert [float(p["into"]) for p in points if p["pruner"] == "synflow"] == [value for layer in synflow["units"] for value in layer[0]]
    assert len(list(csv.DictReader((tmp_path / "imp/layers.csv").open()))) == 3 * 3
    courses = rows(tmp_path, "imp")[0]["mean_square"]
    assert [len(course) for course in courses.values()] == [3, 3, 3]


def test_published_command_lines():
    parse = lambda line: settings_of(arguments().parse_args(line.split()))
    line = "--model-class lottery --model vgg16 --dataset cifar10 --experiment example --pruner synflow"
    found = parse(f"{line} --compression-ratio 1 2 5 10 15 20")
    assert (found.model.name, found.model.options, found.experiment) == ("vgg16_plain", {"variant": "average"}, "singleshot")
    assert (found.pruners, found.compression_ratios, found.data.batch_size, found.train.lr) == (
        ["synflow"],
        [1, 2, 5, 10, 15, 20],
        256,
        1e-3,
    )
    assert parse(f"{line} --compression-exponent 0.5 1").compression_ratios == pytest.approx([10**0.5, 10])
    found = parse(
        "--model-class lottery --model resnet50 --prune-bias false --prune-train-mode true --optimizer momentum "
        "--lr-drops 60 120 --post-epochs 160"
    )
    assert found.model.name == "resnet50" and not found.prune_bias and found.prune_train_mode
    assert found.train.milestones == [0.375, 0.75] and found.train.nesterov and found.train.momentum == 0.9
    assert parse("--model-class lottery --model wide-resnet32").model.options == {"shortcut": "conv", "width": 2}
    assert parse("--model-class imagenet --model vgg16-bn").model.name == "torchvision/vgg16_bn"
    assert parse("--pruner mag --prune-epochs 3 --compression-schedule exponential").iterations == {"magnitude": 3}


DEPTHS = ("20", "32", "44", "56", "110", "1202")
NETWORKS = [("default", name) for name in ("fc", "conv")]
NETWORKS += [("lottery", f"vgg{depth}{norm}") for depth in (11, 13, 16, 19) for norm in ("", "-bn")]
NETWORKS += [("lottery", f"{wide}resnet{depth}") for depth in DEPTHS for wide in ("", "wide-")]
NETWORKS += [("tinyimagenet", f"vgg{depth}{norm}") for depth in (11, 13, 16, 19) for norm in ("", "-bn")]
NETWORKS += [("tinyimagenet", f"{wide}resnet{depth}") for depth in (18, 34, 50, 101, 152) for wide in ("", "wide-")]
NETWORKS += [("imagenet", f"vgg{depth}{norm}") for depth in (11, 13, 16, 19) for norm in ("", "-bn")]
NETWORKS += [("imagenet", f"resnet{depth}") for depth in (18, 34, 50, 101, 152)] + [("imagenet", f"wide-resnet{d}") for d in (50, 101)]


@pytest.mark.parametrize(("kind", "name"), NETWORKS)
def test_every_published_network_is_built(kind, name):
    settings = settings_of(arguments().parse_args(["--model-class", kind, "--model", name]))
    with torch.device("meta"):
        model = own("models").build(settings.model.name, 10, **settings.model.options)
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert norms == (name.endswith("-bn") or "resnet" in name)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    depth = int("".join(filter(str.isdigit, name)) or {"fc": 6, "conv": 3}[name])
    # 1x1 convolutions on the skip paths are not counted in a ResNet's name.
    skips = sum(isinstance(module, nn.Conv2d) and ("shortcut" in path or "downsample" in path) for path, module in model.named_modules())
    heads = {"lottery": 1, "tinyimagenet": 3, "imagenet": 3}.get(kind, 1) if name.startswith("vgg") else 1
    assert layers - skips == depth + (heads - 3 if name.startswith("vgg") else 0)


def test_every_published_optimizer():
    parse = lambda name: settings_of(arguments().parse_args(["--optimizer", name])).train
    found = {name: (parse(name).optimizer, parse(name).momentum, parse(name).nesterov) for name in ("sgd", "momentum", "rms")}
    assert found == {"sgd": ("sgd", 0.0, False), "momentum": ("sgd", 0.9, True), "rms": ("rmsprop", 0.0, True)}
    assert parse("adam").optimizer == "adam"


def test_mnist_and_tiny_imagenet_run(tmp_path):
    """From files in the published formats: all five criteria, RMSprop, and every weight counted."""
    write(tmp_path / "data/MNIST/raw")
    flags = ["--dataset", "mnist", "--optimizer", "rms", "--lr", "0.001", "--post-epochs", "1", "--set", f"data.root={tmp_path / 'data'}"]
    flags += ["--compression-ratio", "5", "--pre-epochs", "0", "--prune-epochs", "2"]
    assert command(tmp_path, *flags, "--expid", "mnist") == 0
    total = 72 + 576 + 8 * 784 * 10
    assert [row["kept"] for row in rows(tmp_path, "mnist")] == [-(-total // 5)] * 5
    tiny = tmp_path / "tiny-imagenet-200"
    for name, count in (("n1", 6), ("n2", 6)):
        for index in range(count):
            path = tiny / "train" / name / "images" / f"{name}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (40 * index, 99, 30)).save(path)
    (tiny / "val/images").mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (64, 64), (10, 50 * index, 200)).save(tiny / f"val/images/val_{index}.JPEG")
    lines = [f"val_{index}.JPEG\tn{1 + index % 2}\t0\t0\t9\t9\n" for index in range(4)]
    (tiny / "val/val_annotations.txt").write_text("".join(lines))
    flags = ["--dataset", "tiny-imagenet", "--model-class", "tinyimagenet", "--model", "vgg11-bn", "--post-epochs", "1", "--workers", "0"]
    flags += ["--set", f"data.root={tiny}", "--set", 'model.options={"width": 0.05}', "--compression-ratio", "2", "--pruner", "synflow"]
    assert command(tmp_path, *flags, "--prune-epochs", "2", "--expid", "tiny", "--set", "data.val_fraction=0.2") == 0
    (row,) = rows(tmp_path, "tiny")
    assert row["structure"]["layers"][-1]["shape"][0] == 2 and abs(row["density"] - 0.5) < 1e-3


def test_biases_and_skip_paths_are_pruned_where_asked(tmp_path):
    flags = ["--compression-ratio", "4", "--pruner-list", "synflow", "snip", "--post-epochs", "1", "--prune-epochs", "3"]
    assert command(tmp_path, *flags, "--prune-bias", "true", "--expid", "bias") == 0
    for row in rows(tmp_path, "bias"):
        assert row["kept"] == -(-(TOTAL + 8 + 8 + 10) // 4)
        assert {layer["name"] for layer in row["structure"]["layers"]} >= {"0.bias", "2.bias", "5.bias"}
    flags += ["--prune-residual", "true", "--model-class", "lottery", "--model", "resnet20", "--set", 'model.options={"width": 0.25}']
    assert command(tmp_path, *flags, "--expid", "residual", "--reinitialize", "true") == 0
    weights = sum(p.numel() for p in own("models").build("resnet20", 10, 1, width=0.25).parameters() if p.dim() > 1)
    for row in rows(tmp_path, "residual"):
        scales = [layer for layer in row["structure"]["layers"] if len(layer["shape"]) == 1]
        assert [layer["weights"] for layer in scales] == [4, 4, 4, 8, 8, 16, 16] and all(layer["macs"] == 0 for layer in scales)
        assert row["kept"] == -(-(weights + 60) // 4)


def test_unit_conservation_with_biases(tmp_path):
    """With trained (non-zero) biases the flow into a unit and its bias's share together leave it."""
    flags = ["--experiment", "unit-conservation", "--pruner", "synflow", "--model", "fc", "--set", 'model.options={"width": 12}']
    gaps = {}
    for flag in ("true", "false"):
        assert command(tmp_path, *flags, "--prune-bias", flag, "--expid", flag) == 0
        gaps[flag] = rows(tmp_path, flag)[0]["largest_relative_gap"]
    assert gaps["true"] < 1e-12 and gaps["false"] < 1e-12


@pytest.mark.parametrize(
    "line,sentence",
    [
        ("--compression 5", "say --compression-ratio 5 .* or --compression-exponent 5"),
        ("--compression-list 1 2", "--compression-ratio 1"),
        ("--compression-ratio 5 --compression-exponent 1", "not both"),
        ("--compression-ratio 0.5", "at least 1"),
        ("--prune-residual true", "needs scales on skip paths, which 'conv' has not"),
        ("--dataset mnist --set data.root=/nowhere", "/nowhere given by data.root"),
        ("--gpu 99", "torch sees"),
        ('--set iterations={"sinflow":3}', "unknown weight criterion 'sinflow' .did you mean 'synflow'"),
        ("--prune-epochs 0", "expected at least 1"),
        ('--set exclude=["*"]', "matches no parameter"),
        ("--model resnet7", "no network for"),
        ("--pretrained true", "needs the weights"),
        ('--set pruners=["magnitud"]', "did you mean 'magnitude'"),
    ],
)
def test_bad_input(tmp_path, capsys, line, sentence):
    assert command(tmp_path, *line.split()) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_published_configurations_are_valid():
    found = {path.stem: load_settings(AtInitConfig, path) for path in CONFIGS.glob("*.json")}
    assert found["vgg16_cifar10"].compression_ratios == [1, 2, 5, 10, 15, 20] and found["vgg16_cifar10"].pre_epochs == {"magnitude": 200}
    assert found["resnet50_cifar10"].model.name == "resnet50" and len(found["vgg16_cifar10"].pruners) == 5
