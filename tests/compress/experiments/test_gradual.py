"""Oracle: the budgets and identities that define the arms, on the embedded digits through the command line."""

import csv
import json
from pathlib import Path

import pytest

from compress.experiments.base import main_guard
from compress.experiments.gradual import main
from compress.masks import load_masked
from compress.siblings import own

CONFIG = str(Path(__file__).parents[3] / "configs/gradual/digits.json")


def command(folder, *settings, config=CONFIG):
    overrides = [part for setting in settings for part in ("--set", setting)]
    return main_guard(main, ["--config_path", config, "--output_dir", str(folder), *overrides])


def results(folder, name="gradual-digits"):
    return json.loads((folder / name / "results.json").read_text())


def test_versus(tmp_path, capsys):
    assert command(tmp_path, "seeds=[0]", "train.epochs=1", "steps=3") == 0
    found = results(tmp_path)
    rows = {(row["arm"], row["target"]): row for row in found["rows"]}
    assert len(rows) == 10
    for target, prunes in ((0.5, 1), (0.8, 2)):
        assert {arm: rows[arm, target]["steps"] for arm, _ in rows} == {
            "gradual": 3 * prunes, "instant_total": 3 * prunes, "instant_tail": 3, "dense_continued": 3 * prunes,
            "scratch_mask": 3 * prunes,
        }  # fmt: skip
        sparsities = [rows[arm, target]["sparsity"] for arm in ("gradual", "instant_total", "instant_tail", "scratch_mask")]
        assert len(set(sparsities)) == 1 and abs(sparsities[0] - target) < 1e-4
        assert rows["dense_continued", target]["accuracy_pruned"] == found["dense_accuracy"]["0"]
        assert rows["gradual", target]["mac_fraction"] == rows["scratch_mask", target]["mac_fraction"] < 1
    # To the first target, gradual pruning is instant pruning.
    assert rows["gradual", 0.5]["accuracy"] == rows["instant_total", 0.5]["accuracy"] == rows["instant_tail", 0.5]["accuracy"]
    first, second = (
        load_masked(
            own("models").build("conv", 10, 1, image_size=8, width=8), tmp_path / f"gradual-digits/masks/gradual-{t}-s0.safetensors"
        )
        for t in (0.5, 0.8)
    )
    assert all(bool((second[name] <= first[name]).all()) for name in first.names) and first.scope == "all-weights"
    figures = {path.name for path in (tmp_path / "gradual-digits/figures").iterdir()}
    stems = ("gradual_vs_instant", "gradual_pruning", "schedules", "final_accuracy", "course")
    assert figures == {f"{stem}.{kind}" for stem in stems for kind in ("png", "csv")}
    points = list(csv.DictReader((tmp_path / "gradual-digits/figures/gradual_vs_instant.csv").open()))
    assert {(p["series"], float(p["fraction pruned"])): float(p["mean"]) for p in points} == {
        key: row["accuracy"] for key, row in rows.items()
    }
    # The same command again computes nothing; another configuration is refused.
    capsys.readouterr()
    assert command(tmp_path, "seeds=[0]", "train.epochs=1", "steps=3") == 0
    assert "run " not in capsys.readouterr().err and results(tmp_path) == found
    assert command(tmp_path, "steps=4") == 2
    assert "another configuration" in capsys.readouterr().err


def test_prunes_split_the_same_total(tmp_path):
    settings = ('kind="prunes"', "prunes=[3,1]", "steps=10", "seeds=[1]", "train.epochs=1", "final_sparsity=0.9", 'scope="conv+linear"')
    assert command(tmp_path, *settings) == 0
    rows = results(tmp_path)["rows"]
    assert [row["steps"] for row in rows] == [3, 3, 4, 10]
    assert [row["sparsity"] for row in rows] == pytest.approx([1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9, 0.9], abs=1e-3)
    assert rows[2]["sparsity"] == rows[3]["sparsity"]


@pytest.mark.parametrize(
    "setting,sentence",
    [
        ('arms=["instant"]', "Unknown arm 'instant'"),
        ("targets=[0.5, 0.4]", "non-decreasing list"),
        ("stepps=3", "did you mean 'steps'"),
        ('scope="bias"', "`scope`"),
        ('measure="last"', "unmeasured"),
        ("seeds=[1, 1]", "same value twice"),
        ('schedule="cubik"', "did you mean 'cubic'"),
    ],
)
def test_bad_settings(tmp_path, capsys, setting, sentence):
    assert command(tmp_path, setting) == 2
    assert sentence in capsys.readouterr().err


def test_published_configurations_are_valid():
    from compress.experiments.gradual import GradualConfig
    from compress.experiments.settings import load_settings

    for path in Path(CONFIG).parent.glob("*.json"):
        assert load_settings(GradualConfig, path).name.startswith("gradual-")
