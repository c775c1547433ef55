"""Oracle: networks whose relative cost and whose live bytes are known by construction; timing itself is never asserted against a clock."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.latency import Latency, compare, latencies, latency, peak_memory, quantile

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder(nn.Module):
    """Notes the state in which it runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = set()

    def forward(self, x):
        self.seen.add((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return self.layer(x)


def test_runs_in_evaluation_and_inference_mode_with_the_given_threads():
    model, before = Recorder(), torch.get_num_threads()
    result = latency(model, torch.zeros(2, 4), seconds=0.02, threads=2)
    assert model.seen == {(False, True, 2)}
    assert torch.get_num_threads() == before and model.training
    assert result.runs >= 5 and 0 < result.p10_ms <= result.median_ms <= result.p90_ms


def test_threads_and_flags_are_restored_when_the_model_raises():
    model, before = nn.Linear(4, 4), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        latency(model, torch.zeros(2, 5), threads=before + 1)
    assert torch.get_num_threads() == before and model.training


def test_on_a_cpu_there_is_no_graph():
    model = nn.Linear(4, 4)
    assert list(latencies(model, torch.zeros(1, 4), seconds=0.01)) == ["eager"]
    with pytest.raises(UserError, match="'graph'"):
        latency(model, torch.zeros(1, 4), mode="graph")


class Calls(nn.Module):
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x):
        self.log.append(self.name)
        return x


def test_comparison_takes_turns_and_the_first_is_the_reference():
    log = []
    result = compare({"a": Calls("a", log), "b": Calls("b", log)}, torch.zeros(1), seconds=0.01)
    turns = "".join(name for i, name in enumerate(log) if i == 0 or log[i - 1] != name)
    assert turns == "ab" * (len(turns) // 2) == "ab" * (1 + 10)
    assert (result["a"].speedup, result["a"].speedup_p10, result["a"].speedup_p90) == (1.0, 1.0, 1.0)
    assert result["b"].speedup_p10 <= result["b"].speedup <= result["b"].speedup_p90
    assert isinstance(result["b"].latency, Latency)


def test_a_machine_that_slows_down_does_not_change_a_speedup(monkeypatch):
    drift = [1.0, 1.5, 4.0, 2.0, 9.0, 3.0, 1.0, 1.0, 1.0, 30.0]
    scripts = {"a": iter([0.006 * d for d in drift]), "b": iter([0.002 * d for d in drift])}
    asked = []
    monkeypatch.setattr("compress.latency.prepared", lambda model, *_: contextlib.nullcontext(
        lambda seconds: asked.append(seconds) or [value := next(scripts[model]), 0.9 * value, 1.1 * value]))
    result = compare({"a": "a", "b": "b"}, None, seconds=2.5)
    assert asked == [0.25] * 20 and result["b"].latency.runs == 30
    assert result["b"].latency.median_ms == pytest.approx(2 * (1.5 * 1.1 + 2 * 0.9) / 2)
    assert [result["b"].speedup, result["b"].speedup_p10, result["b"].speedup_p90] == pytest.approx([3.0] * 3)


def test_quantile_interpolates():
    assert quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.1) == pytest.approx(1.4)


def test_peak_memory_of_a_chain_and_of_a_kept_residual():
    x = torch.zeros(3, 10)
    chain = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(100, 1000, bias=False), nn.Linear(1000, 10, bias=False))
    weights = 10 * 100 + 100 * 1000 + 1000 * 10
    # While the second layer runs, its input and its output are alive; afterwards the input is freed.
    assert peak_memory(chain, x) == 4 * (weights + 3 * 10 + 3 * (100 + 1000))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain

        def forward(self, x):
            kept = x.repeat(1, 50)
            return (self.chain(x)[:, :1] + kept).sum()

    assert peak_memory(Residual(), x) == 4 * (3 * 10 + 3 * 500 + weights + 3 * (100 + 1000))


def test_peak_memory_counts_views_in_place_results_and_tied_weights_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 8, bias=False))
    model[4].weight = model[1].weight
    model.train()
    assert peak_memory(model, torch.zeros(5, 2, 4)) == 4 * (64 + 40 + 2 * 40)
    assert model.training


@needs_cuda
def test_cuda_eager_graph_and_memory():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).cuda()
    x = torch.zeros(4, 3, 64, 64, device="cuda")
    result = latencies(model, x, seconds=0.1)
    assert list(result) == ["eager", "graph"]
    assert all(0 < r.p10_ms <= r.median_ms <= r.p90_ms for r in result.values())
    fixed = sum(4 * p.numel() for p in model.parameters()) + 4 * x.numel()
    assert peak_memory(model, x) >= fixed + 2 * 4 * 4 * 64 * 64 * 64
    assert set(compare({"a": model, "b": model[0]}, x, seconds=0.05, mode="graph")) == {"a", "b"}
