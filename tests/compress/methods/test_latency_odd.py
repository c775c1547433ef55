"""Oracle: the same clock on networks of every kind of layer, on second rounds, on scores without information; sentences where nothing can be done."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.allocate.knapsack import Option, knapsack
from compress.errors import RunError, UserError
from compress.graph import trace
from compress.methods import Context, method
from compress.methods.timed_widths import LayerTimes, narrowest
from compress.methods.timing import ABOVE, BELOW, Timing, meet

from .clock import Clock
from .test_latency import BATCHES, X, network, saved
from .test_timed_widths import Residual, measured


class Own(nn.Conv2d):
    """A convolution of the user with a signature of its own."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


class OwnNorm(nn.BatchNorm2d):
    def __init__(self, tag, channels):
        super().__init__(channels)
        self.tag = tag


def chain(*middle):
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *middle, nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


NETWORKS = {
    "groups": lambda: chain(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(32, 32, 1)),
    "depthwise": lambda: chain(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1)),
    "transposed": lambda: chain(nn.ConvTranspose2d(32, 32, 2, stride=2)),
    "own classes": lambda: chain(Own(32), OwnNorm("x", 32)),
    "no affine, no statistics": lambda: chain(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32, affine=False), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32, track_running_stats=False)),
    "weight norm": lambda: chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 3, padding=1))),
    "channels last": lambda: chain(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)).to(memory_format=torch.channels_last),
    "double": lambda: chain(nn.Conv2d(32, 32, 3, padding=1)).double(),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_layers_of_every_kind_are_timed(monkeypatch, kind):
    Clock().install(monkeypatch)
    model = NETWORKS[kind]()
    x = X.to(next(model.parameters()))
    for ratio in (0.3, 0.6):
        small, _, _ = compress(model, x, [(x, BATCHES[0][1])], method="l1", budget={"latency": ratio}, allocation="measured", recalibrate=False)
        assert ratio - BELOW <= saved(model, small, x) <= ratio + 0.1  # of two or three groups with nine widths each


def test_one_dimensional_convolutions_are_timed():
    model = nn.Sequential(nn.Conv1d(3, 48, 5, padding=2), nn.ReLU(), nn.Conv1d(48, 48, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 4)).eval()
    x = torch.randn(8, 3, 64)
    graph = trace(model, x)
    times = LayerTimes(graph, model, graph.groups[:2], Timing(x, seconds=0.01), {})
    assert len(times.layers) == 3 and times({group.name: group.size for group in graph.groups[:2]}) > 0


def test_a_layer_that_does_not_run_cut_counts_by_its_weight(monkeypatch):
    class Stubborn(nn.Conv2d):
        def forward(self, x):
            assert not self.alone or x.shape[1] == 32
            return super().forward(x)

    Clock().install(monkeypatch)
    stubborn = Stubborn(32, 32, 3, padding=1)
    stubborn.alone = False
    model = chain(stubborn)
    context, _, problem, _ = measured(model)
    stubborn.alone = True
    times = LayerTimes(context.graph, model, problem.groups, Timing(X), {})
    half = {group.name: group.size // 2 for group in problem.groups}
    (layer,) = (layer for layer in times.layers if isinstance(layer.module, Stubborn))
    times(half)
    full = times.known[layer.key, layer.full]
    assert times.known[layer.key, (16, 16, 16)] == pytest.approx(full / 4)


def test_stand_ins_disturb_nothing(monkeypatch):
    Clock().install(monkeypatch)
    model = Residual().train()
    calls = []
    model.a[0].register_forward_hook(lambda *_: calls.append(1))
    before, random, flags = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [module.training for module in model.modules()]
    context, _, problem, _ = measured(model)
    LayerTimes(context.graph, model, problem.groups, Timing(X), {})(narrowest(problem.groups))
    assert torch.equal(torch.get_rng_state(), random) and [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("allocation", ["global", "uniform", "measured"])
def test_a_second_round_under_a_cap_reaches_what_the_cap_allows(monkeypatch, allocation):
    Clock().install(monkeypatch)
    model = nn.Sequential(*(layer for c in (3, 64, 64) for layer in (nn.Conv2d(c, 64, 3, padding=1), nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    once, _, _ = compress(model, X, BATCHES, budget={"latency": 0.4}, recalibrate=False, max_layer_ratio=0.3, allocation=allocation)
    context = Context(once, trace(once, X), X, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), original=trace(model, X).count(), uncompressed=model,
                      max_layer_ratio=0.3, allocation=allocation)
    chosen, twice = method("l1"), copy.deepcopy(once)
    chosen.apply(twice, context, chosen.prepare(context), {"latency": 0.65})
    assert 0.65 - BELOW <= saved(model, twice) <= 0.65 + ABOVE


@pytest.mark.parametrize("gain", [0.3, 0.7, 1.0, 1.9, 2.5, 3.5])
def test_the_network_may_gain_more_or_less_than_its_layers(monkeypatch, gain):
    monkeypatch.setattr("compress.methods.timing.latency", lambda *_: type("L", (), {"median_ms": 1e-3}))
    monkeypatch.setattr(Timing, "saved", lambda self, original, small: min(gain * small, 0.95))
    share, found = meet(0.28, Timing(X), 0.0, 0.0, (1000.0, 0.0), lambda limit: 1 - limit / 1000, lambda share: share, "it")
    assert 0.28 - BELOW <= found <= 0.28 + ABOVE and found == pytest.approx(min(gain * share, 0.95))


def test_groups_that_cost_nothing_are_cut_as_far_as_the_budget_asks(monkeypatch):
    Clock().install(monkeypatch)
    model = Residual().eval()
    with torch.no_grad():
        model.head.weight.zero_()
    small, _, _ = compress(model, X, BATCHES, method="l1", budget={"latency": 0.3}, allocation="measured", recalibrate=False)
    assert 0.3 - BELOW <= saved(model, small) <= 0.4


def test_the_narrowest_network_is_what_is_out_of_reach(monkeypatch):
    Clock().install(monkeypatch)
    model = nn.Sequential(*(layer for c in (3, 64, 64) for layer in (nn.Conv2d(c, 64, 3, padding=1), nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    small, _, _ = compress(model, X, BATCHES, budget={"latency": 0.985}, recalibrate=False, max_layer_ratio=0.98, allocation="measured")
    assert saved(model, small) > 0.975


@pytest.mark.parametrize("allocation", ["global", "uniform", "measured"])
def test_no_channel_to_remove_is_said_before_anything_is_measured(allocation):
    for model, settings in ((nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}), (network(), {"round_to": 64})):
        context = Context(model.eval(), trace(model, X), X, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), allocation=allocation, **settings)
        for ask in (lambda: method("l1").check_budget(context, {"latency": 0.5}),
                    lambda: compress(model, X, BATCHES, budget={"latency": 0.5}, allocation=allocation, **settings)):
            with pytest.raises(UserError, match="No channels of this network may be removed"):
                ask()


class Reads(nn.Module):
    """Reads the type of a layer's weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(192, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.b(self.a(x.flatten(1).to(self.a.weight.dtype)))


def test_a_network_that_reads_a_replaced_layer_is_named(monkeypatch):
    Clock().install(monkeypatch)
    with pytest.raises(RunError, match="cannot be run .*exclude the layers"):
        compress(Reads().eval(), X, BATCHES, method="svd", budget={"latency": 0.2}, recalibrate=False)


def test_blocks_keep_the_memory_format():
    model = network().to(memory_format=torch.channels_last)
    small, _, _ = compress(model, X, method="tucker", budget={"macs": 0.5}, recalibrate=False)
    cores = [module.core.weight for module in small if hasattr(module, "core")]
    assert cores and all(core.is_contiguous(memory_format=torch.channels_last) for core in cores) and not any(core.is_contiguous() for core in cores)


def test_losses_that_are_no_numbers_are_the_worst():
    for bad in (float("inf"), float("nan")):
        assert knapsack([[Option(bad, (10.0,)), Option(bad, (1.0,))]], [5.0]) == [1]
        assert knapsack([[Option(0.0, (10.0,)), Option(bad, (1.0,))]], [5.0]) == [1]
        assert knapsack([[Option(bad, (1.0,)), Option(3.0, (2.0,))]] * 2, [4.0]) == [1, 1]


def test_layers_on_a_concatenation_are_timed_on_a_grid(monkeypatch):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.convs, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.ModuleList(nn.Conv2d(24 + 12 * n, 12, 3, padding=1) for n in range(8)), nn.Linear(120, 4)

        def forward(self, x):
            x = self.stem(x).relu()
            for conv in self.convs:
                x = torch.cat([x, conv(x).relu()], 1)
            return self.head(x.mean((2, 3)))

    clock, model, seen = Clock().install(monkeypatch), Dense().eval(), []
    for grid in (16, 10**6):
        monkeypatch.setattr("compress.methods.timed_widths.GRID", grid)
        clock.seen = 0
        small, _, _ = compress(model, X, BATCHES, method="l1", budget={"latency": 0.4}, allocation="measured", recalibrate=False)
        seen.append(clock.seen)
        assert 0.4 - BELOW <= saved(model, small) <= 0.45
    assert seen[0] < 0.7 * seen[1]
