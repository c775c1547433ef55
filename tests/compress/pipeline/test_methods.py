"""Oracle: counts read back from the saved networks, and the bytes of a run that was interrupted between its rounds."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from compress import load
from compress.config_file import apply_override, validate
from compress.cost import count
from compress.pipeline import entry
from compress.pipeline.run import run

ROOT = Path(__file__).resolve().parents[3]
TINY = ["device=cpu", "data.name=digits", "data.train_images=200", "model.name=resnet20", "model.options={\"width\": 0.5}", "train.epochs=1", "finetune.epochs=1",
        "prune.ratios=[0.3]", "prune.seeds=[0]", "prune.calibration_images=64", "prune.recalibration_images=64", "benchmark.enabled=false"]


def _rounds(name, *overrides):
    raw = {"name": name, "prune": {"methods": ["l1", "improved_eigendamage"], "rounds": 2}}
    for override in (*TINY, *overrides):
        apply_override(raw, override)
    return validate(raw)


def _hashes(folder):
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*/model.safetensors")}


@pytest.mark.slow_ci
def test_rounds_reach_the_ratio_and_an_interrupted_run_ends_in_the_same_bytes(tmp_path, monkeypatch):
    folder = run(_rounds("r"), tmp_path, log=lambda line: None)
    expected = _hashes(folder)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    details = json.loads((folder / "results.json").read_text())["meta"]["details"]
    for row in rows[1:]:
        assert row["macs_removed"] == pytest.approx(0.3, abs=0.02)
        assert count(load(folder / f"{row['method']}-macs0.3-s0"), torch.zeros(1, 1, 8, 8)).macs == row["macs"]
    # one fine-tuning per cut, and one after the growth between two cuts
    assert [len(details[f"{name}-macs0.3-s0"]["history"]) for name in ("l1", "improved_eigendamage")] == [2, 3]

    calls, fit = [], entry.fit

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    again = tmp_path / "again"
    monkeypatch.setattr(entry, "fit", failing)
    for _ in range(4):
        calls.clear()
        try:
            run(_rounds("r"), again, log=lambda line: None)
        except KeyboardInterrupt:
            continue
    monkeypatch.setattr(entry, "fit", fit)
    run(_rounds("r"), again, log=lambda line: None)
    assert _hashes(again / "r") == expected


@pytest.mark.slow_ci
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eigendamage_table").glob("*.json")), ids=lambda path: path.stem)
def test_the_configurations_of_the_eigendamage_table_run_on_digits(tmp_path, path):
    raw = json.loads(path.read_text())
    for override in TINY:
        apply_override(raw, override)
    for options in raw["prune"].get("method_options", {}).values():
        if "rounds" in options:
            options["rounds"] = 3
    folder = run(validate(raw), tmp_path, log=lambda line: None)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows[1:]] == raw["prune"]["methods"]
    assert all(row["params_removed"] == pytest.approx(0.3, abs=0.03) for row in rows[1:])
