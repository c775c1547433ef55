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


def _plans(folder, *launcher):
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, *launcher, str(ROOT / "main_prune.py"), "--config_path", str(folder / "c.json"), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "p" / f"{method}-macs0.5-s0" / "plan.json").read_text())["steps"] for method in METHODS]


@pytest.mark.slow_ci
def test_statistics_of_the_first_process_wait_for_no_other(tmp_path):
    alone = _plans(tmp_path / "alone")
    assert all(alone)
    assert _plans(tmp_path / "pair", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631") == alone
