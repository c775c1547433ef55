"""Oracle: the dense network's outputs; measured times are replaced by given ones where a decision is tested."""

import json
import time

import pytest
import torch
from torch import nn

from kernels import SparseConv2d, SparseLinear, measure, sparsify, timing

from .masks import masked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(),
        nn.Linear(32 * 64, 64), nn.Linear(64, 10)
    )
    generator = torch.Generator().manual_seed(0)
    for number, sparsity in ((3, 0.9), (5, 0.95)):
        weight = model[number].weight
        weight.data = masked(weight.shape[0], weight[0].numel(), sparsity, "random", generator).view_as(weight)
    return model


def with_times(monkeypatch, ratio: float, network_ratio: float = 2.0) -> None:
    """Every sparse form takes 1 / ratio of dense, the sparse network 1 / network_ratio."""
    monkeypatch.setattr(measure, "layer_times", lambda layer, offered, *rest: measure.Measured(
        {"dense": 100.0, **{label: 100.0 / ratio + i for i, label in enumerate(offered)}}))
    monkeypatch.setattr(timing, "on_cpu", lambda calls, *rest, **more: [timing.Timing(100.0, 90, 110, 5), timing.Timing(100.0 / network_ratio, 90,
                                                                                                                  110, 5)])


def test_faster_forms_replace_their_layers(monkeypatch):
    with_times(monkeypatch, ratio=2.0)
    model = network().eval()
    x = torch.randn(2, 3, 8, 8)
    sparse, report = sparsify(model, x)
    assert isinstance(sparse[3], SparseConv2d) and isinstance(sparse[5], SparseLinear)
    assert type(sparse[0]) is nn.Conv2d and type(model[3]) is nn.Conv2d
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-4)
    by_layer = {c.layer: c for c in report.choices}
    assert by_layer["3"].speedup == pytest.approx(2.0) and by_layer["3"].choice.startswith("csr")
    assert by_layer["0"].choice == "dense" and "only 0.0% of the weights are zero" in by_layer["0"].reason
    assert report.replaced == ["3", "5"] and "100 us" in by_layer["5"].reason


@pytest.mark.parametrize("ratio, margin, wins", [(1.02, 0.03, False), (1.04, 0.03, True), (1.4, 0.5, False), (1.6, 0.5, True), (1.001, 0.0, True)])
def test_a_form_must_win_by_more_than_the_margin(monkeypatch, ratio, margin, wins):
    """On both sides of the margin, which is 3 % unless another is given."""
    with_times(monkeypatch, ratio=ratio)
    sparse, report = sparsify(network(), torch.randn(2, 3, 8, 8), **({} if margin == 0.03 else {"margin": margin}))
    assert any(isinstance(m, (SparseLinear, SparseConv2d)) for m in sparse.modules()) == wins
    assert report.replaced == (["3", "5"] if wins else []) and "dense took 100 us" in report.choices[1].reason


def test_a_network_that_did_not_get_faster_is_returned_dense(monkeypatch):
    with_times(monkeypatch, ratio=3.0, network_ratio=0.99)
    sparse, report = sparsify(network(), torch.randn(2, 3, 8, 8))
    assert not any(isinstance(m, (SparseLinear, SparseConv2d)) for m in sparse.modules())
    assert report.replaced == [] and "returned dense" in str(report)


def test_measurements_are_kept_and_reused(monkeypatch, cache):
    model, x = network(), torch.randn(2, 3, 8, 8)
    _, first = sparsify(model, x, seconds=0.02)
    rows = json.loads((cache / "kernels.json").read_text())
    assert len(rows) == 2 and all("dense" in row and "csr torch" in row for row in rows.values())
    assert any("conv (32, 32, 3, 3)" in key and "(2, 32, 8, 8)" in key and "density 0.1" in key and torch.__version__ in key
               for key in rows)
    monkeypatch.setattr(measure, "layer_times", lambda *args: pytest.fail("measured again"))
    _, second = sparsify(model, x)
    assert [(c.layer, c.dense_us) for c in second.choices if c.layer in "35"] == [(c.layer, c.dense_us) for c in first.choices
                                                                                  if c.layer in "35"]


def test_another_batch_size_is_measured_anew(monkeypatch, cache):
    with_times(monkeypatch, ratio=2.0)
    model = network()
    sparsify(model, torch.randn(2, 3, 8, 8))
    sparsify(model, torch.randn(1, 3, 8, 8))
    assert len(json.loads((cache / "kernels.json").read_text())) == 4


def test_wrong_results_are_never_chosen(monkeypatch):
    """A kernel that computes something else does not enter the measurement."""
    layer = network()[5]

    class Wrong(nn.Module):
        def forward(self, x):
            return layer(x).detach() * 1.01

    from kernels.candidates import Candidate

    layer.requires_grad_(False)
    offered = {"wrong": Candidate("wrong", Wrong), "right": Candidate("right", lambda: layer)}
    found = measure.layer_times(layer, offered, (2, 2048), False, 0.01)
    assert set(found.times) == {"dense", "right"} and found.faults == {"wrong": "it differs from the dense layer by 1.0e-02"}


def test_slow_layers_cost_few_calls(monkeypatch):
    """A layer whose call takes longer than SLOW: candidates are tried on a part of the batch first, and few rounds of all of it are run."""
    calls = []

    class Timed(nn.Module):
        def __init__(self, name, factor):
            super().__init__()
            self.name, self.factor, self.weight = name, factor, torch.zeros(2, 2)

        def forward(self, x):
            calls.append((self.name, len(x)))
            time.sleep(self.factor * len(x) / 32 * 0.06)
            return x

    from kernels.candidates import Candidate

    offered = {name: Candidate(name, lambda name=name, factor=factor: Timed(name, factor)) for name, factor in (("near", 0.8), ("far", 20.0))}
    times = measure.layer_times(Timed("dense", 1.0), offered, (32, 2), False, 0.01).times
    assert set(times) == {"dense", "near"} and times["near"] < times["dense"]
    assert calls.count(("far", 2)) == 2 and calls.count(("far", 32)) == 0
    assert calls.count(("near", 32)) == calls.count(("dense", 32)) == 1 + 2 * 2


def test_layers_that_must_stay(monkeypatch):
    with_times(monkeypatch, ratio=2.0)
    model = network()
    model.append(nn.Linear(10, 10))
    model.append(nn.Linear(10, 10))
    model[7].weight.data *= torch.rand(10, 10) < 0.2
    model[8].weight = model[7].weight
    grouped = nn.Conv2d(3, 3, 3, groups=3, padding=1)
    grouped.weight.data *= torch.rand_like(grouped.weight) < 0.2
    _, report = sparsify(nn.Sequential(grouped, model), torch.randn(2, 3, 8, 8))
    reasons = {c.layer: c.reason for c in report.choices}
    assert "3 groups" in reasons["0"] and "tied" in reasons["1.7"] and "tied" in reasons["1.8"]


def test_flags_and_buffers_are_left_alone(monkeypatch):
    with_times(monkeypatch, ratio=2.0)
    model = network().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sparse, _ = sparsify(model, torch.randn(2, 3, 8, 8))
    assert model.training and not model[1].training and model[3].training and sparse[3].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_module_under_two_names_is_replaced_under_both(monkeypatch):
    with_times(monkeypatch, ratio=2.0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.first.weight.data *= torch.rand(16, 16) < 0.2
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    sparse, report = sparsify(Twice(), torch.randn(2, 16))
    assert isinstance(sparse.first, SparseLinear) and sparse.first is sparse.second
    assert report.choices[0].dense_us == 200


def test_interleaved_timing_counts_every_call():
    calls = []
    times = timing.on_cpu([lambda: calls.append(0), lambda: calls.append(1)], 0.0)
    assert calls == [0, 1] * (timing.MIN_ROUNDS + 1) and [t.runs for t in times] == [timing.MIN_ROUNDS] * 2
    timing.on_cpu([lambda: calls.append(2)], 0.0, rounds=2, warm=True)
    assert calls[-3:] == [1, 2, 2]
    assert timing.summarise([3e-6, 1e-6, 2e-6]) == timing.Timing(pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0), 3)
