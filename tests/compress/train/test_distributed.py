"""Oracle: the same training in one process (equal up to rounding), and the other rank (equal bit for bit)."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compress.errors import RunError, Terminated, UserError
from compress.train import Dist, connect
from tests.compress.train.helpers import fork
from tests.compress.train.joined_run import report, train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, port: int, work, timeout: float = 60.0) -> int:
    """Fork rank `rank` of 2 with torchrun's environment; `work` gets the connected process."""

    def run():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with connect("cpu", timeout_seconds=timeout) as distributed:
            work(distributed)

    return fork(run)


def exits(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def results(folder: Path) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_equals_single(folder: Path) -> None:
    first, second = results(folder)
    assert first["digest"] == second["digest"] and first["history"] == second["history"]
    model, history = train(Dist())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    for mine, row in zip(first["history"], history, strict=True):
        assert mine == pytest.approx({key: value for key, value in row.items() if key != "seconds"}, rel=1e-4)


def test_two_processes_train_what_one_does(tmp_path):
    port = free_port()
    assert exits([join(rank, port, lambda process: report(tmp_path, process)) for rank in (0, 1)]) == [0, 0]
    assert_equals_single(tmp_path)


def test_torchrun_trains_data_parallel(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, "-m", "tests.compress.train.joined_run", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equals_single(tmp_path)


def test_sigterm_to_one_process_stops_both_and_both_continue_exactly(tmp_path):
    path = tmp_path / "c.safetensors"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()

    def interrupted(process: Dist) -> None:
        steps = []

        def terminate():
            steps.append(1)
            if len(steps) == 7 and process.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Terminated):
            train(process, path, norm=True, after_step=terminate)
        assert len(steps) == 8

    for work in (
        lambda process: report(whole, process, norm=True),
        interrupted,
        lambda process: report(cut, process, norm=True, checkpoint=path),
    ):
        port = free_port()
        assert exits([join(rank, port, work) for rank in (0, 1)]) == [0, 0]
    assert [one["digest"] for one in results(whole)] == [one["digest"] for one in results(cut)]
    assert results(whole)[0]["digest"] == results(whole)[1]["digest"]
    assert results(whole)[0]["history"] == results(cut)[1]["history"]


@pytest.mark.parametrize("lost", ["gone", "hanging"])
def test_a_broken_peer_ends_in_one_sentence(lost):
    port = free_port()

    def work(process: Dist) -> None:
        process.barrier()
        if process.rank == 1:
            if lost == "hanging":
                time.sleep(20)
            os._exit(7)
        with pytest.raises(RunError, match="Process 0 of 2 lost a peer") as error:
            process.barrier()
        assert "\n" not in str(error.value)

    first, second = (join(rank, port, work, timeout=2.0) for rank in (0, 1))
    assert exits([first]) == [0]
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)


def test_tensors_of_any_type_are_broadcast():
    """Buffers of packed weights are 16-bit integers, which gloo does not know."""

    def work(process: Dist) -> None:
        kinds = (torch.int16, torch.int32, torch.float32, torch.bfloat16, torch.float64, torch.uint8)
        tensors = [torch.full((3,), process.rank + 1, dtype=kind) for kind in kinds] + [torch.empty(0, dtype=torch.int16)]
        flag, number = torch.tensor([process.is_main]), torch.tensor(process.rank + 7.0)
        process.broadcast_([*tensors, flag, number])
        assert all((tensor == 1).all() for tensor in tensors) and flag.item() is True and number.item() == 7

    port = free_port()
    assert exits([join(rank, port, work) for rank in range(2)]) == [0, 0]


def test_alone_there_is_nothing_to_do(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with connect("cpu") as process:
        tensor = torch.ones(2)
        process.sum_([tensor])
        assert (process.rank, process.world_size, process.is_main, tensor.tolist()) == (0, 1, True, [1, 1])
        assert process.share_bytes(b"abc") == b"abc"


def test_an_incomplete_environment_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun"), connect("cpu"):
        pass
