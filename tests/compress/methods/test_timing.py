"""Oracle: functions whose root is known; every choice of a small menu; a clock that the timed layers move on."""

from itertools import product

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.methods import layer_times
from compress.methods.menus import Menu, choose
from compress.methods.timed_menus import OPTIONS, spread
from compress.methods.timing import ABOVE, BELOW, TRIALS, Timing, meet, search

X = torch.zeros(2, 3)


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
    monkeypatch.setattr("compress.methods.timing.latency", lambda model, *rest: type("L", (), {"median_ms": model.ns / 1e6}))
    monkeypatch.setattr(Timing, "saved", lambda self, original, small: 1 - small.ns / original.ns)
    original = Fake([100] * 4)
    for ratio in (0.1, 0.3, 0.5):
        times = 400.0, float(sum(min(cost[2] for cost in menu.costs) for menu in menus))
        chosen, found = meet(ratio, Timing(X), original, original, times, lambda limit: choose(menus, 2, limit),
                             lambda c: Fake([m.costs[i][2] for m, i in zip(menus, c)]), "it")
        every = [c for c in product(range(6), repeat=4) if 1 - (50 + sum(m.costs[i][2] for m, i in zip(menus, c))) / 450 >= min(found, ratio)]
        best = min(sum(m.losses[i] for m, i in zip(menus, c)) for c in every)
        assert found >= ratio - BELOW and sum(m.losses[i] for m, i in zip(menus, chosen)) <= best + 1e-9


def test_a_menu_is_thinned_over_its_whole_range():
    menu = Menu("x", (None, *((r,) for r in range(1, 101))), (0.0, *(1 / r for r in range(1, 101))), ((200, 200), *((r, r) for r in range(1, 101))))
    picked = spread(menu)
    assert picked[0] == 0 and len(picked) == OPTIONS + 1 and picked[1] == 1 and picked[-1] == 100
    assert max(b - a for a, b in zip(picked[1:], picked[2:])) <= 10


class Spends(nn.Module):
    """Moves the clock on by a known time per call."""

    def __init__(self, seconds, clock, log):
        super().__init__()
        self.seconds, self.clock, self.log, self.weight = seconds, clock, log, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.log.append((self.seconds, self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        self.clock[0] += self.seconds


def test_layers_are_timed_in_turns_as_they_are_used(monkeypatch):
    clock, log, threads = [0.0], [], torch.get_num_threads()
    monkeypatch.setattr(layer_times.time, "perf_counter", lambda: clock[0])
    dense, found = layer_times.compare_layers({"a": (Spends(0.002, clock, log), (X, X)), "b": (Spends(0.02, clock, log), (X,))}, Timing(X, seconds=0.4, threads=2))
    assert dense == pytest.approx(4e6) and found == {"a": 1.0, "b": pytest.approx(0.2)}
    assert {entry[1:] for entry in log} == {(False, True, 2)} and torch.get_num_threads() == threads
    slow = [number for number, entry in enumerate(log) if entry[0] == 0.02]
    assert len(slow) == 2 + layer_times.TURNS  # two to warm up, then one in each turn, the other layer between
    assert all(after - before > 1 for before, after in zip(slow[2:], slow[3:]))
