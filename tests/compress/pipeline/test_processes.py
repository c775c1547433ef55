"""Oracle: the run of one process, whose plan the first of two processes must find by itself while the other waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
METHODS = ["kron_obs", "kfac_svd"]
CONFIG = {
    "name": "p", "device": "cpu", "threads": 1, "data": {"train_images": 128, "crop_padding": 1}, "model": {"options": {"width": 0.25}},
    "train": {"epochs": 0}, "finetune": {"epochs": 0}, "benchmark": {"enabled": False},
    "prune": {"methods": METHODS, "ratios": [0.5], "calibration_images": 64, "recalibration_images": 64},
}


PAIR = "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"


def _run(folder, config, *launcher):
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(config))
    command = [sys.executable, *launcher, str(ROOT / "main_prune.py"), "--config_path", str(folder / "c.json"), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _plans(folder, *launcher):
    done = _run(folder, CONFIG, *launcher)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "p" / f"{method}-macs0.5-s0" / "plan.json").read_text())["steps"] for method in METHODS]


@pytest.mark.slow_ci
def test_statistics_of_the_first_process_wait_for_no_other(tmp_path):
    alone = _plans(tmp_path / "alone")
    assert all(alone)
    assert _plans(tmp_path / "pair", *PAIR) == alone


@pytest.mark.slow_ci
def test_a_ratio_out_of_reach_is_refused_on_both_processes_and_reported_by_the_first(tmp_path):
    prune = {**CONFIG["prune"], "methods": ["l1"], "ratios": [0.9999], "budget": "latency", "latency_batch_size": 8}
    done = _run(tmp_path / "pair", {**CONFIG, "prune": prune, "finetune": {"epochs": 1}}, *PAIR)
    assert done.returncode != 0 and done.stderr.count("main_prune.py: l1-latency0.9999-s0: A budget") == 1
    results = json.loads((tmp_path / "pair" / "p" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["dense"] and "cannot be reached" in results["meta"]["unreachable"][0]
