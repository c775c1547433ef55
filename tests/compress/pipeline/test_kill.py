"""Oracle: the run that was never interrupted; killed and continued, its weights must be the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {
    "name": "k", "device": "cpu", "threads": 1, "data": {"train_images": 400, "crop_padding": 1}, "model": {"options": {"width": 0.25}},
    "train": {"epochs": 6, "lr": 0.05, "ema": 0.9}, "finetune": {"epochs": 4, "distill": {}},
    "prune": {"methods": ["random", "l1"], "ratios": [0.5], "calibration_images": 64, "recalibration_images": 64}, "benchmark": {"enabled": False},
}


def _command(folder, *extra):
    (folder / "c.json").write_text(json.dumps(CONFIG))
    return [str(ROOT / "main_prune.py"), "--config_path", str(folder / "c.json"), "--output_dir", str(folder), *extra]


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _hashes(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("model.safetensors"))}


def _finish(folder):
    done = subprocess.run([sys.executable, *_command(folder)], env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return _hashes(folder / "k")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    started = time.monotonic()
    hashes = _finish(folder)
    assert len(hashes) == 3
    return hashes, time.monotonic() - started


@pytest.mark.slow_ci
def test_killed_at_ten_random_moments_the_weights_are_the_same_bytes(tmp_path, reference):
    hashes, seconds = reference
    moments = random.Random(0)
    killed = 0
    while killed < 10:
        process = subprocess.Popen([sys.executable, *_command(tmp_path)], env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # Most of a short run is starting up; the run grows shorter as more of it is stored, so a finished one is started over.
            process.wait(timeout=moments.uniform(0.3, 0.9) * seconds)
            assert process.returncode == 0
            subprocess.run(["rm", "-rf", str(tmp_path / "k" / "l1-macs0.5-s0"), str(tmp_path / "k" / "base")], check=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    assert _finish(tmp_path) == hashes


@pytest.mark.slow_ci
def test_sigterm_saves_leaves_with_143_and_the_same_command_continues(tmp_path, reference):
    process = subprocess.Popen([sys.executable, *_command(tmp_path)], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert len(error.strip().splitlines()) == 1 and "SIGTERM" in error
    assert _finish(tmp_path) == reference[0]


@pytest.mark.slow_ci
def test_two_processes_train_data_parallel_and_cut_the_same_plan_on_both(tmp_path, reference):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617", *_command(tmp_path)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "k" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "random", "l1"]
    assert all(abs(row["macs_removed"] - 0.5) <= 0.01 for row in rows[1:])
    # `random` draws its scores from the seed alone, so its plan does not depend on how the weights were summed.
    single = _finish(tmp_path / "single") if (tmp_path / "single").mkdir() is None else None
    plans = [json.loads((folder / "k" / "random-macs0.5-s0" / "plan.json").read_text()) for folder in (tmp_path, tmp_path / "single")]
    assert plans[0]["steps"] == plans[1]["steps"] and single
    assert done.stdout.count("base accuracy") == 1
