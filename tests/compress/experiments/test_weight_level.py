"""Oracle: the published algorithm written out (pool, sort, threshold), on the embedded digits through the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.experiments.base import main_guard
from compress.experiments.settings import load_settings
from compress.experiments.weight_level import WeightLevelConfig, arguments, main, settings_of
from compress.masks import load_masked
from compress.siblings import own

CONFIGS = Path(__file__).parents[3] / "configs/weight_level"


def command(stage, folder, *flags):
    return main_guard(main, [stage, "--config_path", str(CONFIGS / "digits.json"), "--output_dir", str(folder), *map(str, flags)])


def network():
    return own("models").build("conv", 10, 1, image_size=8, width=8)


def test_train_prune_finetune(tmp_path, capsys):
    assert command("train", tmp_path, "--epochs", 1, "--save", tmp_path / "base") == 0
    base = tmp_path / "base/model.safetensors"
    assert command("prune", tmp_path, "--percent", 0.3, "--resume", base, "--save_dir", tmp_path / "cut") == 0
    state = load_file(base)
    conv = [name for name, value in state.items() if value.dim() == 4]
    pool = torch.cat([state[name].abs().flatten() for name in conv]).sort().values
    threshold = pool[int(len(pool) * 0.3)]
    masks = load_masked(network(), tmp_path / "cut/pruned.safetensors")
    assert masks.names == conv and masks.scope == "conv"
    for name in conv:
        # The published code also drops the weight at the threshold itself.
        assert torch.equal(masks[name], state[name].abs() >= threshold)
        assert torch.equal(masks.parameter(name), state[name] * masks[name])
    assert masks.total - masks.kept == int(len(pool) * 0.3)
    text = (tmp_path / "cut/prune.txt").read_text()
    assert f"total {masks.total} pruned {masks.total - masks.kept}" in text and "accuracy after" in text
    assert command("finetune", tmp_path, "--resume", tmp_path / "cut/pruned.safetensors", "--epochs", 2) == 0
    tuned = load_masked(network(), tmp_path / "cut/finetuned.safetensors")
    assert all(torch.equal(tuned[name], masks[name]) for name in conv)
    assert all(bool((tuned.parameter(name)[~masks[name]] == 0).all()) for name in conv)
    assert any(not torch.equal(tuned.parameter(name), masks.parameter(name)) for name in conv)
    assert len((tmp_path / "cut/log_finetune.txt").read_text().splitlines()) == 3


def test_all_arms(tmp_path):
    assert command("all", tmp_path, "--set", "sparsities=[0.8]") == 0
    rows = {row["arm"]: row for row in json.loads((tmp_path / "weight-level-digits/results.json").read_text())["rows"]}
    assert len({row["sparsity"] for row in rows.values()}) == len({row["macs_nonzero"] for row in rows.values()}) == 1
    row = rows["finetune"]
    assert row["scope"] == "conv" and abs(row["sparsity"] - 0.8) < 1 / 600
    dense = sum(p.numel() for p in network().parameters())
    assert row["params"] == dense - round(row["sparsity"] * 648)
    assert rows["scratch_e"]["epochs"] == 2 and rows["scratch_b"]["epochs"] == round(2 * row["macs"] / row["macs_nonzero"])
    assert {"accuracy_pruned", "accuracy_recalibrated", "accuracy"} <= set(row)
    assert row["structure"]["density"] == pytest.approx(1 - row["sparsity"])


def test_iterative_pruning_nests(tmp_path):
    assert command("all", tmp_path, "--set", "iterative=true", "--set", 'arms=["finetune"]', "--set", "sparsities=[0.3,0.6]") == 0
    first, second = (load_masked(network(), tmp_path / f"weight-level-digits/networks/finetune-{s}-s0.safetensors") for s in (0.3, 0.6))
    assert all(bool((second[name] <= first[name]).all()) for name in first.names)
    assert (first.kept, second.kept) == (454, 260)


def test_published_flags():
    parse = lambda line: settings_of(arguments().parse_args(line.split()))
    found = parse("train --dataset cifar10 --arch vgg16 --epochs 200 --schedule 60 120 160 --gamma 0.2 --wd 5e-4 --train-batch 64")
    assert (found.model.name, found.data.name, found.data.batch_size) == ("vgg16_weight_level", "cifar10", 64)
    assert (found.train.epochs, found.train.milestones, found.train.gamma, found.train.weight_decay) == (200, [0.3, 0.6, 0.8], 0.2, 5e-4)
    assert WeightLevelConfig().train.epochs == 300 and WeightLevelConfig().train.milestones == [0.5, 0.75]
    found = parse("finetune --arch preresnet110 --dataset cifar10 --resume x --schedule 41 42")
    assert (found.finetune.epochs, found.finetune.schedule, found.finetune.lr) == (40, "constant", 1e-3)


@pytest.mark.parametrize(
    ("line", "name", "options"),
    [
        ("--arch vgg", "vgg16_weight_level", {}),
        ("--arch resnet --depth 56", "resnet56", {}),
        ("--arch resnet56 --block-name BasicBlock", "resnet56", {}),
        ("--arch preresnet --depth 110", "preresnet110", {}),
        ("--arch preresnet --depth 110 --block-name Bottleneck", "preresnet110_bottleneck", {}),
        ("--arch wrn --depth 28 --widen-factor 10", "wrn_28_10", {"width": 10}),
        ("--arch wrn --depth 16", "wrn_16_8", {"width": 4}),
    ],
)
def test_networks_of_a_family(line, name, options):
    model = settings_of(arguments().parse_args(["train", *line.split()])).model
    assert (model.name, model.options) == (name, options)


def test_training_goes_on_from_given_weights(tmp_path, capsys):
    assert command("train", tmp_path, "--epochs", 1, "--save", tmp_path / "a") == 0
    first = tmp_path / "a/model.safetensors"
    capsys.readouterr()
    assert command("train", tmp_path, "--evaluate", "--resume", first) == 0
    measured = capsys.readouterr().err
    assert command("train", tmp_path, "--epochs", 0, "--load-model", first, "--save", tmp_path / "b", "--overwrite") == 0
    assert measured.strip() in capsys.readouterr().err
    again = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in load_file(first).items())
    assert command("train", tmp_path, "--epochs", 1, "--resume", first, "--save", tmp_path / "b", "--overwrite") == 0
    assert any(not torch.equal(value, load_file(first)[name]) for name, value in load_file(tmp_path / "b/model.safetensors").items())


def test_published_configurations_are_valid():
    names = {path.stem for path in CONFIGS.glob("*.json") if load_settings(WeightLevelConfig, path)}
    assert {f"{arch}_{data}" for arch in ("vgg16", "resnet56", "resnet110", "preresnet110") for data in ("cifar10", "cifar100")} <= names


@pytest.mark.parametrize(
    "stage,flags,sentence",
    [
        ("prune", ["--percent", "30", "--resume", "x", "--save_dir", "y"], "write 0.3 for 30 percent"),
        ("prune", [], "needs --resume"),
        ("train", ["--load-optimizer", "x"], "nothing to load"),
        ("train", ["--evaluate"], "train --evaluate --resume MODEL"),
        ("train", ["--arch", "resnet"], "needs --depth, one of 20"),
        ("train", ["--arch", "resnet56", "--depth", "20"], "one network, which --depth does not change"),
        ("train", ["--arch", "wrn", "--depth", "16", "--block-name", "bottleneck"], "basic blocks only"),
        ("train", ["--depth", "20"], "give --arch too"),
        ("finetune", [], "needs --resume"),
        ("finetune", ["--resume", "/nowhere.safetensors"], "does not exist"),
        ("all", ["--set", 'arms=["scratch"]'], "Unknown arm 'scratch'"),
        ("all", ["--set", "iterative=true"], "takes arms"),
        ("all", ["--set", "sparsities=[0.5,1.0]"], "a sparsity is the fraction removed, in [0, 1), got 1"),
        ("all", ["--set", "sparsities=[0.9999]", "--set", "train.epochs=1"], "would remove every weight"),
    ],
)
def test_bad_input(tmp_path, capsys, stage, flags, sentence):
    assert command(stage, tmp_path, *flags) == 2
    assert sentence in capsys.readouterr().err
