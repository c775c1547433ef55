"""Oracle: a clock that is a function of the layers, read on the compressed network; every choice of a small menu; functions whose root is known."""

import copy
import time
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.allocate.problem import build_problem
from compress.cost import count
from compress.errors import UserError
from compress.graph import trace
from compress.methods import Context, method, names
from compress.methods.layer_times import TURNS, compare_layers
from compress.methods.menus import Menu, choose
from compress.methods.timed_menus import OPTIONS, spread
from compress.methods.timed_widths import LayerTimes, choose_widths, ladder
from compress.methods.timing import ABOVE, BELOW, TRIALS, Timing, meet, search

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


def test_the_choice_is_the_best_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    class Fake:
        """A network that is its choice; its time is the sum of the options' and 50 for what is between the layers."""

        def __init__(self, times):
            self.ns = 50 + sum(times)

    menus = []
    for layer in range(4):
        times = [100, *torch.randint(10, 95, (5,), generator=generator).tolist()]
        losses = [0.0, *torch.rand(5, generator=generator).tolist()]
        menus.append(Menu(str(layer), (None, *((r,) for r in range(5))), tuple(losses), tuple((t, t, t) for t in times)))
    clock = Clock()
    clock.latency = lambda model, *rest: type("L", (), {"median_ms": model.ns / 1e6})
    monkeypatch.setattr("compress.methods.timing.latency", clock.latency)
    monkeypatch.setattr(Timing, "saved", lambda self, original, small: 1 - small.ns / original.ns)
    original = Fake([100] * 4)
    for ratio in (0.1, 0.3, 0.5):
        times = 400.0, float(sum(min(cost[2] for cost in menu.costs) for menu in menus))
        chosen, found = meet(ratio, Timing(X), original, original, times, lambda limit: choose(menus, 2, limit),
                             lambda c: Fake([m.costs[i][2] for m, i in zip(menus, c)]), "it")
        every = [c for c in product(range(6), repeat=4) if 1 - (50 + sum(m.costs[i][2] for m, i in zip(menus, c))) / 450 >= min(found, ratio)]
        best = min(sum(m.losses[i] for m, i in zip(menus, c)) for c in every)
        assert found >= ratio - BELOW and sum(m.losses[i] for m, i in zip(menus, chosen)) <= best + 1e-9


class Residual(nn.Module):
    """Two blocks on one stream, a depthwise layer in the second, and a change of width between."""

    def __init__(self):
        super().__init__()
        conv = lambda c, o, k=3, **other: nn.Sequential(nn.Conv2d(c, o, k, padding=k // 2, bias=False, **other), nn.BatchNorm2d(o))  # noqa: E731
        self.stem, self.a, self.b = conv(3, 16), conv(16, 24), conv(24, 16)
        self.c, self.d, self.e, self.head = conv(16, 40, 1), conv(40, 40, groups=40), conv(40, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        x = x + self.e(self.d(self.c(x).relu()).relu())
        return self.head(x.relu().mean((2, 3)))


def measured(model, **settings):
    """Context, scores, allocation problem and losses of the allocation "measured" by L1."""
    context = Context(model, trace(model, X), X, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), allocation="measured", **settings)
    chosen = method("l1")
    state = chosen.prepare(context)
    losses = chosen.losses(context, state)
    return context, state, build_problem(context.graph, state, "macs", 0.0, 0.95, settings.get("round_to", 1), 1, None, losses), losses


@pytest.mark.parametrize("block", [1, 8])
def test_the_times_of_layers_add_up_to_the_network(monkeypatch, block):
    Clock(block=block).install(monkeypatch)
    model = Residual().eval()
    context, _, problem, _ = measured(model)
    times, full = LayerTimes(context.graph, model, problem.groups, Timing(X), {}), {group.name: group.size for group in problem.groups}
    assert times(full) == pytest.approx(nanoseconds(model, X, block=block), rel=1e-9)
    for shrink in (0, 1, 2):
        kept = {group.name: ladder(group.widths)[(shrink + number) % 4] for number, group in enumerate(problem.groups)}
        small = copy.deepcopy(model)
        context.graph.prune(small, {group.name: group.order[: group.size - kept[group.name]].sort().values for group in problem.groups if kept[group.name] < group.size})
        assert times(kept) == pytest.approx(nanoseconds(small, X, block=block), rel=1e-9)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_widths_are_close_to_the_best_of_all(monkeypatch, block, share):
    Clock(block=block).install(monkeypatch)
    model = Residual().eval()
    context, _, problem, losses = measured(model)
    times, full = LayerTimes(context.graph, model, problem.groups, Timing(X), {}), {group.name: group.size for group in problem.groups}
    limit = share * times(full)
    loss = lambda kept: sum(float(losses[g.name][: g.size - kept[g.name]].sum()) for g in problem.groups)  # noqa: E731
    found = choose_widths(problem.groups, losses, times, limit)
    names_, every = list(full), product(*(ladder(group.widths) for group in problem.groups))
    best = min(loss(kept) for widths in every if times(kept := dict(zip(names_, widths))) <= limit)
    assert times(found) <= limit and best <= loss(found) <= 1.2 * best  # three groups leave gaps that a multiplier cannot fill


def test_widths_follow_the_blocks_of_the_kernels(monkeypatch):
    Clock(block=8).install(monkeypatch)
    model = Residual().eval()
    small, _, report = compress(model, X, BATCHES, method="l1", budget={"latency": 0.4}, allocation="measured", recalibrate=False)
    assert 0.4 - BELOW <= saved(model, small, block=8) <= 0.4 + 0.1  # of three groups, in blocks of 8
    assert all(new % 8 == 0 for name, (old, new) in report.widths.items() if new != old and name != "d.0")


def test_measured_widths_fall_short_with_a_sentence(monkeypatch):
    Clock(call=1e6).install(monkeypatch)
    with pytest.raises(UserError, match="fastest network that l1 allows saves 0"):
        compress(Residual().eval(), X, BATCHES, method="l1", budget={"latency": 0.9}, allocation="measured", recalibrate=False)


@pytest.mark.parametrize(("widths", "expected"), [(range(16, 0, -1), [16, 14, 12, 10, 8, 6, 4, 2, 1]), (range(64, 3, -1), [64, 56, 48, 40, 32, 24, 16, 8, 4]), ((5, 4, 3, 2, 1), [5, 4, 3, 2, 1]),
                                              ((64, 48, 32), [64, 48, 32]), (range(24, 1, -1), [24, 20, 16, 12, 8, 4, 2]), ((1,), [1])])
def test_a_group_may_keep_a_few_widths(widths, expected):
    assert ladder(tuple(widths)) == expected


def test_a_menu_is_thinned_over_its_whole_range():
    menu = Menu("x", (None, *((r,) for r in range(1, 101))), (0.0, *(1 / r for r in range(1, 101))), ((200, 200), *((r, r) for r in range(1, 101))))
    picked = spread(menu)
    assert picked[0] == 0 and len(picked) == OPTIONS + 1 and picked[1] == 1 and picked[-1] == 100
    assert max(b - a for a, b in zip(picked[1:], picked[2:])) <= 10


@pytest.mark.parametrize("curve", [lambda m: m, lambda m: m**2, lambda m: 0.6 * m, lambda m: m**0.5, lambda m: 1.2 * m - 0.1, lambda m: m**4])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.55])
def test_the_search_finds_known_roots(curve, ratio):
    asked = []
    found = search(ratio, 0.95, lambda m: asked.append(m) or curve(m), "it")
    assert found == (asked[-1], curve(asked[-1])) and len(asked) <= TRIALS + 1 and asked[-2] == asked[-1]
    assert ratio - BELOW <= found[1] <= ratio + ABOVE


def test_the_search_takes_the_least_of_more_where_the_time_jumps():
    ratio, found = search(0.5, 0.95, lambda m: 0.2 if m < 0.6 else 0.7, "it")
    assert found == 0.7 and 0.6 <= ratio <= 0.64


def test_a_lucky_measurement_is_not_enough():
    values = iter([0.5, 0.3, 0.7, 0.49, 0.51])
    asked = []
    assert search(0.5, 0.95, lambda m: asked.append(m) or next(values), "it") == (asked[-1], pytest.approx(0.5))
    assert asked[0] == asked[1] and asked[3] == asked[4] and asked[1] < asked[3] < asked[2]


def test_the_search_says_what_is_possible():
    with pytest.raises(UserError, match=r"removes 0.5 of the latency cannot be reached on this device: the fastest network that it allows saves 0.380"):
        search(0.5, 0.95, lambda m: 0.4 * m, "it")


def test_only_methods_that_share_time_take_it():
    takes = {name for name in names() if "latency" in method(name).budgets}
    assert takes >= {"l1", "kron_obs", *RANKS} and not {name for name in takes if name.startswith("mask_")}
    for name in ("eigendamage", "mask_magnitude"):
        with pytest.raises(UserError, match="takes one of"):
            compress(network(), X, BATCHES, method=name, budget={"latency": 0.5})


class Sleeper(nn.Module):
    """Takes a known time per call."""

    def __init__(self, ms, log):
        super().__init__()
        self.ms, self.log, self.weight = ms, log, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.log.append((self.ms, self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(self.ms / 1e3)


def test_layers_are_timed_in_turns_as_they_are_used():
    log, threads = [], torch.get_num_threads()
    dense, found = compare_layers({"a": (Sleeper(2, log), (X, X)), "b": (Sleeper(20, log), (X,))}, Timing(X, seconds=0.4, threads=2))
    assert {entry[1:] for entry in log} == {(False, True, 2)} and torch.get_num_threads() == threads
    assert found["a"] == 1 and 0 < found["b"] < 1 and dense > 4e6
    slow = [number for number, entry in enumerate(log) if entry[0] == 20]
    assert len(slow) == 2 + TURNS and all(after - before > 1 for before, after in zip(slow[2:], slow[3:]))


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
