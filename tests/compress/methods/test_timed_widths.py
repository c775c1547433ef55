"""Oracle: the clock of the whole network for sums over layers; every choice of widths of a small network."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.allocate.problem import build_problem
from compress.errors import UserError
from compress.graph import trace
from compress.methods import Context, method
from compress.methods.timed_widths import LayerTimes, choose_widths, ladder
from compress.methods.timing import BELOW, Timing

from .clock import Clock, nanoseconds
from .test_latency import BATCHES, X, saved


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
