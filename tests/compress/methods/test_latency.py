"""Oracle: a clock that is a function of the layers, read on the compressed network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.cost import count
from compress.errors import UserError
from compress.graph import trace
from compress.methods import Context, method, names
from compress.methods.timing import ABOVE, BELOW, Timing

from .clock import Clock, nanoseconds

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(16) % 4)]
RANKS = ("svd", "tucker", "cp", "kfac_svd", "kfac_tucker", "kfac_cp")


def network():
    """Wide enough that factors pay; a strided layer, a 1x1 one, a linear one."""
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
                         nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


def saved(model, small, inputs=X, **clock):
    return 1 - nanoseconds(small, inputs, **clock) / nanoseconds(model, inputs, **clock)


@pytest.mark.parametrize("name", [*RANKS, "l1", "random", "taylor_fo", "kron_obs"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_ratio_is_of_the_time_on_the_example_inputs(monkeypatch, name, ratio):
    Clock().install(monkeypatch)
    model = network()
    before = copy.deepcopy(model.state_dict())
    small, plan, report = compress(model, X, BATCHES, method=name, budget={"latency": ratio}, recalibrate=False)
    found = saved(model, small)
    assert ratio - BELOW <= found <= ratio + ABOVE
    assert report.latency == plan.meta["latency"] == {"asked": ratio, "saved": pytest.approx(found, abs=1e-9), "batch_size": 16}
    assert f"{found:.1%} saved at batch 16" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert small(X).shape == (16, 4)


@pytest.mark.parametrize("allocation", ["uniform", "measured"])
@pytest.mark.parametrize("name", ["l1", "tucker", "kfac_cp"])
def test_every_allocation_shares_time(monkeypatch, name, allocation):
    Clock().install(monkeypatch)
    model = network()
    small, _, _ = compress(model, X, BATCHES, method=name, budget={"latency": 0.4}, recalibrate=False, allocation=allocation)
    # a few layers with a few ranks or widths each are a coarse grid, on which a budget is met from above
    assert 0.4 - BELOW <= saved(model, small) <= 0.4 + (ABOVE if name == "l1" and allocation == "uniform" else 0.1)


def test_ranks_are_chosen_by_time_and_not_by_products(monkeypatch):
    slow = Clock(depthwise=300.0).install(monkeypatch)
    model = network()
    small, _, report = compress(model, X, BATCHES, method="cp", budget={"latency": 0.02}, recalibrate=False)
    assert 0.02 - BELOW <= saved(model, small, **slow.rates)
    assert set(report.ranks) <= {"5", "11"}  # products of three vectors have a depthwise layer in the middle
    by_macs, _, report = compress(model, X, BATCHES, method="cp", budget={"macs": 0.5}, recalibrate=False)
    assert "7" in report.ranks and saved(model, by_macs, **slow.rates) < 0


@pytest.mark.parametrize(("name", "ratio"), [("cp", 0.5), ("l1", 0.999)])
def test_a_ratio_out_of_reach_names_what_was_measured(monkeypatch, name, ratio):
    Clock(depthwise=300.0).install(monkeypatch)
    with pytest.raises(UserError, match=r"removes 0\.\d+ of the latency cannot be reached on this device.* saves 0\.\d\d\d, measured") as error:
        compress(network(), X, BATCHES, method=name, budget={"latency": ratio}, recalibrate=False)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize("name", ["l1", "svd", "tucker"])
def test_nothing_is_removed_and_nothing_is_timed_at_ratio_zero(monkeypatch, name):
    clock = Clock().install(monkeypatch)
    model = network()
    small, _, _ = compress(model, X, BATCHES, method=name, budget={"latency": 0.0}, recalibrate=False)
    assert clock.seen == 0 and count(small, X) == count(model, X)


@pytest.mark.parametrize("name", ["l1", "svd", "kfac_tucker"])
def test_a_second_round_counts_from_the_uncompressed_network(monkeypatch, name):
    Clock().install(monkeypatch)
    model = network()
    once, _, _ = compress(model, X, BATCHES, method=name, budget={"latency": 0.3}, recalibrate=False)
    context = Context(once, trace(once, X), X, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), original=trace(model, X).count(), uncompressed=model)
    chosen, twice = method(name), copy.deepcopy(once)
    plan = chosen.apply(twice, context, chosen.prepare(context), {"latency": 0.5})
    assert 0.5 - BELOW <= saved(model, twice) <= 0.5 + ABOVE
    assert plan.meta["latency"]["saved"] == pytest.approx(saved(model, twice))


def test_other_inputs_than_the_example_can_be_timed(monkeypatch):
    Clock(call=2e4).install(monkeypatch)
    model, one = network(), X[:1]
    context = Context(model, trace(model, one), one, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), timing=Timing(X))
    chosen, small = method("tucker"), copy.deepcopy(model)
    plan = chosen.apply(small, context, chosen.prepare(context), {"latency": 0.5})
    assert 0.5 - BELOW <= saved(model, small, call=2e4) <= 0.5 + 0.1 and plan.meta["latency"]["batch_size"] == 16
    assert saved(model, small, one, call=2e4) < 0.4  # more layers, whose calls weigh more there


def test_widths_and_ranks_stay_multiples(monkeypatch):
    Clock().install(monkeypatch)
    model = network()
    _, _, report = compress(model, X, BATCHES, method="tucker", budget={"latency": 0.4}, recalibrate=False, round_to=4)
    assert all(kept % 4 == 0 or kept == full for full_ranks, ranks in report.ranks.values() for full, kept in zip(full_ranks, ranks))
    _, _, report = compress(model, X, BATCHES, method="l1", budget={"latency": 0.4}, recalibrate=False, round_to=8)
    assert all(new % 8 == 0 or new == old for old, new in report.widths.values())


class Twice(nn.Module):
    """One layer called on maps of two sizes, and twice as many images."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 4)

    def forward(self, x):
        x = self.shared(self.first(x).relu()).relu()
        x = self.shared(torch.cat([x, x])[..., ::2, ::2]).relu()
        return self.head(x.mean((2, 3)))[: len(x) // 2]


def test_every_call_of_a_layer_counts(monkeypatch):
    Clock().install(monkeypatch)
    model = Twice().eval()
    small, _, report = compress(model, X, BATCHES, method="svd", budget={"latency": 0.5}, recalibrate=False)
    assert "shared" in report.ranks and 0.5 - BELOW <= saved(model, small) <= 0.5 + ABOVE


def test_layers_of_one_shape_are_timed_once(monkeypatch):
    clock = Clock().install(monkeypatch)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())]
    few, many = (nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), *layers[:end], nn.Flatten(), nn.Linear(24 * 64, 4)).eval() for end in (2, 12))
    seen = []
    for model in (few, many):
        clock.seen = 0
        compress(model, X, method="svd", budget={"latency": 0.3}, recalibrate=False)
        seen.append(clock.seen)
    assert seen[1] <= seen[0] + 24  # whole networks, not five more layers of thirteen networks


def test_only_methods_that_share_time_take_it():
    takes = {name for name in names() if "latency" in method(name).budgets}
    assert takes >= {"l1", "kron_obs", *RANKS} and not {name for name in takes if name.startswith("mask_")}
    for name in ("eigendamage", "mask_magnitude"):
        with pytest.raises(UserError, match="takes one of"):
            compress(network(), X, BATCHES, method=name, budget={"latency": 0.5})


@pytest.mark.parametrize("name", ["l1", "tucker"])
def test_on_the_real_clock(name):
    """No figure is asserted; a machine in use may even find the ratio out of reach."""
    model = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4)).eval()
    context = Context(model, trace(model, X), X, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), timing=Timing(X, seconds=0.02))
    chosen, small = method(name), copy.deepcopy(model)
    try:
        plan = chosen.apply(small, context, chosen.prepare(context), {"latency": 0.2})
    except UserError as error:
        assert "measured in turns" in str(error)
    else:
        assert -1 < plan.meta["latency"]["saved"] < 1 and count(small, X).macs < count(model, X).macs and small(X).shape == (16, 4)
