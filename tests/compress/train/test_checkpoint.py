"""Oracle: what was saved comes back bit for bit; a fault injected at every system call leaves one whole generation."""

import os

import pytest
import torch

from compress.errors import RunError, UserError
from compress.train.checkpoint import Checkpoints, decode, digest, encode

TENSORS = {
    "a": torch.arange(6.0).view(2, 3).t(),
    "b": torch.tensor(3),
    "half": torch.randn(4, dtype=torch.bfloat16),
    "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "empty": torch.empty(0, 2),
}
TENSORS["tied"] = TENSORS["a"]


def generation(files: Checkpoints) -> int:
    found = files.load()
    assert found is not None
    return decode(found[0])[1]["number"]


def test_everything_comes_back_bit_for_bit():
    state = {"x": 0.1 + 0.2, "list": [1, None, "é"], "nan": float("inf")}
    tensors, restored = decode(encode(TENSORS, state))
    assert restored == state
    assert digest(tensors) == digest(TENSORS)
    assert torch.equal(tensors["a"], TENSORS["a"]) and tensors["half"].dtype == torch.bfloat16


def test_digest_sees_every_change():
    base = {"w": torch.zeros(2, 3)}
    changed = [{"v": base["w"]}, {"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3).double()}, {"w": torch.zeros(2, 3).neg()}, {}]
    assert len({digest(tensors) for tensors in [base, *changed]}) == 6
    assert digest({"w": torch.zeros(3, 2).t()}) == digest(base)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_newest_file_gives_way_to_the_one_before(tmp_path, cut):
    files = Checkpoints(tmp_path / "c.safetensors")
    for number in range(3):
        files.save(TENSORS, {"number": number})
    data = files.path.read_bytes()
    files.path.write_bytes(data[:cut])
    again = Checkpoints(files.path)
    found = again.load()
    assert found is not None and decode(found[0])[1]["number"] == 1
    assert found[1] is not None and str(files.path) in found[1]
    # The broken file must not push out the whole one.
    again.save(TENSORS, {"number": 3})
    again.path.write_bytes(b"")
    assert generation(Checkpoints(files.path)) == 1


def test_one_changed_bit_is_noticed(tmp_path):
    data = bytearray(encode(TENSORS, {}))
    data[-3] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        decode(bytes(data))


def test_without_a_whole_file_there_is_one_sentence(tmp_path):
    files = Checkpoints(tmp_path / "c.safetensors")
    assert files.load() is None
    files.path.write_bytes(b"not a checkpoint")
    files.previous.mkdir()
    with pytest.raises(UserError, match="No checkpoint can be read") as error:
        files.load()
    assert "\n" not in str(error.value) and str(files.path) in str(error.value)


@pytest.mark.parametrize(("call", "count"), [("replace", 1), ("fsync", 1), ("replace", 2), ("open", 1), ("fsync", 2)])
def test_a_failure_at_any_call_leaves_a_whole_generation(tmp_path, monkeypatch, call, count):
    files = Checkpoints(tmp_path / "c.safetensors")
    files.save(TENSORS, {"number": 0})
    files.save(TENSORS, {"number": 1})
    real, calls = getattr(os, call), []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError, match="No space left"):
        files.save(TENSORS, {"number": 2})
    monkeypatch.undo()
    assert generation(Checkpoints(files.path)) in {1, 2}
    files.save(TENSORS, {"number": 3})
    assert generation(Checkpoints(files.path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []
