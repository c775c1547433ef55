"""Oracles: conservation laws, exact counts and identities between arms, on the embedded digits through the command line."""

import json
import re
from pathlib import Path

import pytest

from compress.experiments.at_init import main
from compress.experiments.at_init_settings import AtInitConfig, arguments, settings_of
from compress.experiments.base import main_guard
from compress.experiments.settings import load_settings

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
        assert (row["mac_fraction"] == 1) == (ratio == 1) and 0 < row["mac_fraction"] <= 1
        for name, panel in row["histograms"]["trained"].items():
            layer = next(layer for layer in row["structure"]["layers"] if layer["name"] == name)
            assert sum(panel["counts"]) == layer["kept"] and len(panel["edges"]) == len(panel["counts"]) + 1
    # Without pruning nothing distinguishes the criteria but magnitude's training before it.
    assert len({found[pruner, 1]["accuracy"] for pruner in ("random", "snip", "grasp", "synflow")}) == 1
    assert found["magnitude", 1]["accuracy_pruned"] > found["random", 1]["accuracy_pruned"]
    folder = tmp_path / "at-init-digits"
    names = {"accuracy", "test_seconds", "mac_fraction", "layer_sparsity", "layer_macs"}
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


@pytest.mark.parametrize(
    "line,sentence",
    [
        ("--compression 5", "say --compression-ratio 5 .* or --compression-exponent 5"),
        ("--compression-list 1 2", "--compression-ratio 1"),
        ("--compression-ratio 5 --compression-exponent 1", "not both"),
        ("--compression-ratio 0.5", "at least 1"),
        ("--prune-residual true", "nothing to prune"),
        ("--prune-bias true", "no synaptic flow"),
        ("--dataset mnist", "not offered"),
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
