"""Oracle: our own counter on the networks that the benchmark compares; a table by hand."""

import pytest
import torch

from benchmarks.one_shot import Ours, Rival, channel_and_low_rank, table
from compress.cost import count
from models import build

X = torch.zeros(1, 3, 32, 32)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 10) for _ in range(2)]


def network():
    torch.manual_seed(0)
    return build("resnet20", 10).eval()


@pytest.mark.parametrize("way", ["global", "uniform"])
def test_our_side_stops_at_or_below_the_target(way):
    model = network()
    small = Ours(model, "l1", batches(), batches(), X).at(1.5, way)
    ratio = count(model, X).macs / count(small, X).macs
    assert 1.5 <= ratio <= 1.65


@pytest.mark.parametrize("name", ["tp_l1", "tp_taylor"])
def test_the_rival_stops_at_or_below_the_target_in_both_ways(name, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr("benchmarks.one_shot.STEPS", 20)
    model = network()
    side = Rival(model, name, batches(), batches(), X)
    for way in ("steps", "one step"):
        small = side.at(1.5, way)
        assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert side.total / count(small, X).macs >= 1.5
    assert count(model, X).macs < side.total  # the zero-padded shortcuts of the original cost nothing


def test_every_method_with_a_budget_of_macs_takes_part():
    assert {"l1", "taylor_fo", "kron_obs", "eigendamage", "kfac_tucker", "cp"} <= set(channel_and_low_rank())


def test_table():
    rows = [{"network": "resnet20", "method": "dense", "target": 1.0, "accuracy": 0.9},
            {"network": "resnet20", "method": "l1", "target": 1.5, "accuracy": 0.5},
            {"network": "resnet20", "method": "cp", "target": 1.5, "accuracy": 0.75},
            {"network": "resnet20", "method": "cp", "target": 2.11, "error": "cannot be reached"}]
    lines = table(rows).splitlines()
    assert lines[2] == "| method | resnet20 (90.00) 1.5x | resnet20 (90.00) 2.11x |"
    assert lines[4:] == ["| `cp` | 75.00 | - |", "| `l1` | 50.00 |  |"]
    again = table([*rows, {"network": "resnet20", "method": "recalibrated", "target": 1.0, "accuracy": 0.89}]).splitlines()
    assert again[2] == "The uncompressed networks: 89.00 for resnet20 recalibrated." and again[4:] == lines[2:]
