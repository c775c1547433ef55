"""Oracle: the same training without an interruption; weights are compared by SHA-256, histories exactly."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from compress.config import TrainConfig
from compress.errors import Terminated, UserError
from compress.train import fit
from tests.compress.train.helpers import fork, small_bundle, small_network
from tests.compress.train.killed_run import EPOCHS, KINDS, train

STEPS = 5


@pytest.fixture(scope="module")
def whole():
    return {kind: train(None, kind) for kind in KINDS}


def wait_for(path, started: float) -> None:
    while not path.exists():
        assert time.monotonic() - started < 60, "no checkpoint appeared"
        time.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_twice_ends_in_the_same_weights(tmp_path, kind, whole):
    path = tmp_path / "c.safetensors"
    for moment in (0.01, 0.2):
        child = fork(lambda: train(path, kind, pause=0.03))
        wait_for(path, time.monotonic())
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the training ended before it was killed"
    assert train(path, kind) == whole[kind]


def test_a_killed_program_is_continued_by_another_process(tmp_path, whole):
    path = tmp_path / "c.safetensors"
    process = start(path, "sgd", 0.05)
    wait_for(path, time.monotonic())
    time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert train(path, "sgd") == whole["sgd"]


def start(path, kind: str, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.compress.train.killed_run", str(path), kind, str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills_at_random_moments(tmp_path, kind, whole):
    path, generator, kills = tmp_path / "c.safetensors", random.Random(kind), 0
    for number in range(10):
        process = start(path, kind, 0.05)
        if number == 0:
            wait_for(path, time.monotonic())
        try:
            process.wait(generator.uniform(1.5, 5.0))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 3
    process = start(path, kind, 0.0)
    assert process.communicate()[0].strip() == whole[kind][0]
    assert train(path, kind) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 3, EPOCHS * STEPS])
def test_sigterm_finishes_the_step_and_the_run_continues_exactly(tmp_path, kind, step, whole):
    path, calls = tmp_path / "c.safetensors", []

    def terminate():
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="SIGTERM") as error:
        train(path, kind, after_step=terminate)
    # The signal comes after the step's own look at it, so that one more step is made at most.
    assert step <= len(calls) <= step + 1
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    rest = []
    assert train(path, kind, after_step=lambda: rest.append(1)) == whole[kind]
    assert len(calls) + len(rest) == EPOCHS * STEPS


def test_a_finished_training_is_only_loaded(tmp_path, whole):
    path = tmp_path / "c.safetensors"
    assert train(path, "adam") == whole["adam"]
    steps = []
    assert train(path, "adam", after_step=lambda: steps.append(1)) == whole["adam"]
    assert steps == []


def test_a_broken_newest_checkpoint_costs_an_epoch_and_not_the_result(tmp_path, whole):
    path, calls = tmp_path / "c.safetensors", []

    def terminate():
        calls.append(1)
        if len(calls) == 3 * STEPS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, "sgd", after_step=terminate)
    path.write_bytes(path.read_bytes()[:-10])
    rest = []
    assert train(path, "sgd", after_step=lambda: rest.append(1)) == whole["sgd"]
    assert len(rest) == (EPOCHS - 1) * STEPS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cfg": {"lr": 0.3}}, "configuration"),
        ({"seed": 9}, "configuration"),
        ({"data": {"train": 64}}, "data set"),
        ({"network": {"norm": False}}, "network"),
    ],
)
def test_another_training_is_refused_in_one_sentence(tmp_path, change, named):
    path = tmp_path / "c.safetensors"

    def run(cfg=None, seed=0, data=None, network=None, resume=True):
        settings = TrainConfig(epochs=1, **(cfg or {}))
        model = small_network(**(network or {}))
        return fit(model, small_bundle(**(data or {})), settings, batch_size=16, seed=seed, checkpoint=path, resume=resume)

    run()
    with pytest.raises(UserError, match=named) as error:
        run(**change)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(run(**change, resume=False)) == 1
