"""Oracle: the published protocol (number and kinds of entries of the list), on the embedded digits through the command line."""

import json
from pathlib import Path

import pytest

from compress.experiments.base import main_guard
from compress.experiments.nim import NimConfig, arguments, main, settings_of, steps_of
from compress.experiments.settings import load_settings
from compress.nim import METHODS

CONFIGS = Path(__file__).parents[3] / "configs/nim"


def command(folder, *flags):
    return main_guard(main, ["--config_path", str(CONFIGS / "digits.json"), "--output_dir", str(folder), *flags])


def test_all_methods_end_to_end(tmp_path):
    assert command(tmp_path, "--set", "log_moves=true", "--set", "train.epochs=1") == 0
    folder = tmp_path / "nim-digits"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        values = [sparsity for sparsity, _ in row["list"]]
        assert len(values) == 3 + 4 + 2 and values[:3] == [0, 0, 0] and values == sorted(values)
        for step, entry in enumerate(row["steps"], 1):
            assert 0.1 * step <= entry["sparsity"] < 0.1 * step + 0.05 and not entry["exhausted"]
            assert sum(entry["removed"].values()) == round((entry["sparsity"] - values[1 + step]) * 648)
        assert values[-1] == values[-3] == row["sparsity"]
        moves = [json.loads(line) for line in (folder / f"moves/model-digits-{row['method']}-s0.jsonl").read_text().splitlines()]
        assert sum(move["removed"] for move in moves) == round(row["sparsity"] * 648)
        assert {move["player"] for move in moves} == set(METHODS[row["method"]])
    assert len({row["accuracy_base"] for row in rows}) == 1
    assert (folder / "figures/model-digits.png").stat().st_size > 0
    assert len((folder / "table.md").read_text().splitlines()) == 10


def test_published_command_lines():
    parse = lambda line: settings_of(arguments().parse_args(line.split()))
    found = parse("--arch DPN92 --dataset cifar10 --load_name models/DPN92cifar10 --prune --prune_method 1+RANDOM")
    assert (found.architectures, found.datasets, found.methods) == (["DPN92"], ["cifar10"], ["1+RANDOM"])
    assert found.model.weights == Path("models/DPN92cifar10") and steps_of(found) == 18
    found = parse(
        "--arch VGG16 --prune_speed 0.1 --target_sparcity 0.5 --nim_stride_size 0.0001 --batch_size 32 --epochs 7 "
        "--prune_learning_rate 0.05"
    )
    assert (found.prune_speed, found.target_sparsity, found.stride, found.data.batch_size, found.train.epochs, found.prune_lr) == (
        0.1,
        0.5,
        1e-4,
        32,
        7,
        0.05,
    )


def test_alias_is_the_method_that_it_means(tmp_path, capsys):
    assert command(tmp_path, "--prune_method", "1+RANDOM", "--set", "train.epochs=1") == 0
    assert "'1+RANDOM' is read as 'L1+RANDOM'" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "nim-digits/results.json").read_text())["rows"]
    assert row["method"] == "L1+RANDOM" and set(row["steps"][0]["removed"]) == {"L1", "RANDOM"}


def test_published_settings_give_the_published_list_length():
    settings = load_settings(NimConfig, CONFIGS / "vgg16_cifar10.json")
    assert 1 + settings.stabilise_epochs + steps_of(settings) + settings.finetune_epochs == 31
    everything = load_settings(NimConfig, CONFIGS / "all_48.json")
    assert len(everything.architectures) * len(everything.datasets) * len(everything.methods) == 48


@pytest.mark.parametrize(
    "flags,sentence",
    [
        (["--prune_method", "L2"], "Unknown pruning method 'L2'"),
        (["--set", 'architectures=["VGG"]'], "Unknown architecture 'VGG'"),
        (["--prune_speed", "0.9"], "there is no step to play"),
        (["--target_sparsity", "95"], "`target_sparsity`"),
        (["--set", 'order="rnd"'], "unknown order of play 'rnd'"),
        (["--nim_stride_size", "1.5"], "is a number of weights, got 1.5"),
        (["--arch", "VGG16"], "takes images of at least 32 pixels a side, and the data has 8x8"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, sentence):
    assert command(tmp_path, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_eval_only(tmp_path):
    assert command(tmp_path, "--eval", "--set", "train.epochs=1") == 0
    row = json.loads((tmp_path / "nim-digits/results.json").read_text())["rows"][0]
    assert 0 <= row["accuracy"] <= 1 and "list" not in row
