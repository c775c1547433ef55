"""Oracle: laws of an allocation, and exhaustive search over thresholds on a chain of convolutions counted by closed formulas."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocate import ALLOCATIONS, allocate, check_ratio, largest
from compress.errors import UserError


@dataclass
class Group:
    name: str
    size: int
    prunable: bool = True
    reason: str = ""


class Chain:
    """3x3 convolutions in a row, `widths` channels wide; layer i works on `areas[i]` positions; the last width is pinned."""

    def __init__(self, widths, areas=None, fixed_params=0):
        self.widths, self.areas, self.fixed = widths, areas or [64] * (len(widths) - 1), fixed_params
        self.groups = [Group(f"g{i}", width) for i, width in enumerate(widths)]
        self.groups[0] = Group("g0", widths[0], False, "input of the network")
        self.groups[-1] = Group(f"g{len(widths) - 1}", widths[-1], False, "output of the network")

    def count(self, keep):
        kept = [len(keep[g.name]) if g.name in keep else g.size for g in self.groups]
        layers = [9 * a * b for a, b in zip(kept, kept[1:])]
        return sum(layers) + self.fixed, sum(layer * area for layer, area in zip(layers, self.areas))


def kept_of(graph, removed):
    return {g.name: torch.tensor([c for c in range(g.size) if c not in set(removed.get(g.name, torch.tensor([])).tolist())])
            for g in graph.groups}


def removed_fraction(graph, removed, quantity):
    index = ("params", "macs").index(quantity)
    return 1 - graph.count(kept_of(graph, removed))[index] / graph.count({})[index]


def random_scores(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in graph.groups if g.prunable}


chains = st.builds(Chain, st.lists(st.integers(12, 48), min_size=3, max_size=7))
deep = st.builds(Chain, st.lists(st.integers(32, 64), min_size=6, max_size=9))


@settings(max_examples=60, deadline=None)
@given(graph=deep, ratio=st.floats(0.02, 0.9), kind=st.sampled_from(["global", "uniform"]),
       quantity=st.sampled_from(["params", "macs"]), seed=st.integers(0, 99))
def test_budget_is_met_within_one_percent(graph, ratio, kind, quantity, seed):
    ratio = min(ratio, largest(graph, quantity))
    removed = allocate(graph, random_scores(graph, seed), {quantity: ratio}, kind)
    assert abs(removed_fraction(graph, removed, quantity) - ratio) <= 0.01


@settings(max_examples=60, deadline=None)
@given(graph=chains, ratio=st.floats(0.02, 0.9), kind=st.sampled_from(["global", "uniform"]), cap=st.floats(0.3, 1.0),
       least=st.integers(1, 8), seed=st.integers(0, 99))
def test_cap_and_order_hold_in_every_group(graph, ratio, kind, cap, least, seed):
    scores = random_scores(graph, seed)
    ratio = min(ratio, largest(graph, "params", cap, 1, least))
    removed = allocate(graph, scores, {"params": ratio}, kind, max_layer_ratio=cap, min_channels=least)
    for group in graph.groups:
        gone = removed.get(group.name, torch.zeros(0, dtype=torch.int64))
        if not group.prunable:
            assert group.name not in removed
            continue
        assert len(gone) <= cap * group.size + 1e-9 and group.size - len(gone) >= least
        lowest = torch.argsort(scores[group.name], stable=True)[:len(gone)].sort().values
        assert torch.equal(gone, lowest)


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6, 0.8])
def test_global_is_the_nearest_threshold(ratio):
    graph = Chain([3, 40, 30, 50, 20, 10])
    scores = random_scores(graph)
    best = min((abs(removed_fraction(graph, cut, "macs") - ratio), tau) for tau in torch.cat(list(scores.values())).tolist()
               if (cut := {name: (s <= tau).nonzero()[:, 0] for name, s in scores.items()})
               and all(len(c) < len(scores[n]) for n, c in cut.items()))
    expected = {name: (s <= best[1]).nonzero()[:, 0] for name, s in scores.items()}
    removed = allocate(graph, scores, {"macs": ratio}, "global", max_layer_ratio=1.0)
    assert {name: cut.tolist() for name, cut in removed.items()} == {n: cut.tolist() for n, cut in expected.items() if len(cut)}


@settings(max_examples=30, deadline=None)
@given(graph=deep, seed=st.integers(0, 99), kind=st.sampled_from(["global", "uniform"]))
def test_a_larger_ratio_removes_a_superset(graph, seed, kind):
    scores = random_scores(graph, seed)
    sets = [{(n, c) for n, cut in allocate(graph, scores, {"params": r}, kind).items() for c in cut.tolist()} for r in (0.2, 0.5, 0.8)]
    assert sets[0] < sets[1] < sets[2]


@settings(max_examples=40, deadline=None)
@given(graph=deep, ratio=st.floats(0.02, 0.9))
def test_uniform_takes_the_same_fraction_everywhere(graph, ratio):
    ratio = min(ratio, largest(graph))
    removed = allocate(graph, random_scores(graph), {"macs": ratio}, "uniform")
    gone = {g.name: len(removed.get(g.name, [])) for g in graph.groups if g.prunable}
    sizes = {g.name: g.size for g in graph.groups}
    # A common fraction f exists with every count within one channel of f * size, unless the cap cuts it off.
    lower = max((count - 1) / sizes[name] for name, count in gone.items())
    upper = min((count + 1) / sizes[name] for name, count in gone.items())
    assert lower <= upper


@settings(max_examples=60, deadline=None)
@given(graph=chains, ratio=st.floats(0.02, 0.8), kind=st.sampled_from(["global", "uniform"]), multiple=st.sampled_from([2, 4, 8]))
def test_rounded_widths_meet_the_budget_from_below(graph, ratio, kind, multiple):
    ratio = min(ratio, largest(graph, "macs", round_to=multiple))
    removed = allocate(graph, random_scores(graph), {"macs": ratio}, kind, round_to=multiple)
    assert removed_fraction(graph, removed, "macs") >= ratio - 1e-12  # two ways of rounding one fraction
    for group in graph.groups:
        left = group.size - len(removed.get(group.name, []))
        assert left == group.size or (left % multiple == 0 and left >= multiple)


def test_rounding_overshoots_by_no_more_than_one_block():
    graph = Chain([3] + [64] * 10 + [10])
    for ratio in (0.2, 0.5, 0.7):
        removed = allocate(graph, random_scores(graph), {"params": ratio}, round_to=8)
        assert ratio <= removed_fraction(graph, removed, "params") <= ratio + 0.02


@pytest.mark.parametrize("channels", [3, 8, 12])
def test_a_channel_larger_than_the_tolerance_is_passed_over(channels):
    # The lowest scores sit in a group whose channels are 4 % of the network each, and the budget lies half-way between two of them.
    graph = Chain([4, 20, 1000, 50], areas=[2000, 1, 1])
    scores = {"g1": torch.arange(20.0), "g2": torch.arange(100.0, 1100.0)}
    below, above = (removed_fraction(graph, {"g1": torch.arange(n)}, "macs") for n in (channels, channels + 1))
    ratio = (below + above) / 2
    assert above - below > 0.03
    removed = allocate(graph, scores, {"macs": ratio})
    assert abs(removed_fraction(graph, removed, "macs") - ratio) <= 0.01
    assert removed["g1"].tolist() == list(range(channels)) and removed["g2"].tolist() == list(range(len(removed["g2"])))


def test_where_every_channel_is_too_large_the_budget_is_exceeded_rather_than_missed():
    graph = Chain([10, 4, 10])
    removed = allocate(graph, {"g1": torch.arange(4.0)}, {"params": 0.3})
    assert removed_fraction(graph, removed, "params") == 0.5


def test_equal_scores_spread_over_the_groups_and_take_the_first_channels():
    graph = Chain([3, 32, 64, 32, 10])
    scores = {g.name: torch.ones(g.size) for g in graph.groups if g.prunable}
    removed = allocate(graph, scores, {"params": 0.5})
    fractions = [len(removed[g.name]) / g.size for g in graph.groups if g.prunable]
    assert max(fractions) - min(fractions) <= 2 / 32
    assert all(cut.tolist() == list(range(len(cut))) for cut in removed.values())


def test_groups_without_scores_and_infinite_scores_are_kept():
    graph = Chain([3, 32, 64, 32, 10])
    scores = random_scores(graph)
    del scores["g2"]
    scores["g1"][5] = float("inf")
    removed = allocate(graph, scores, {"params": 0.6})
    assert "g2" not in removed and 5 not in removed["g1"].tolist()


def test_the_ratio_may_refer_to_an_earlier_network():
    graph = Chain([3, 32, 64, 32, 10])
    before = 2 * graph.count({})[0]
    removed = allocate(graph, random_scores(graph), {"params": 0.75}, original=before)
    left = graph.count(kept_of(graph, removed))[0]
    assert abs((before - left) / before - 0.75) <= 0.01
    assert allocate(graph, random_scores(graph), {"params": 0.4}, original=before) == {}


def test_ratio_zero_removes_nothing_even_where_everything_is_pinned():
    graph = Chain([3, 10])
    assert allocate(graph, {}, {"params": 0.0}) == {}
    assert largest(graph, "params") == 0.0


def test_largest_is_what_the_smallest_widths_remove():
    graph = Chain([3, 32, 64, 10])
    smallest = graph.count({"g1": torch.arange(2), "g2": torch.arange(4)})
    assert largest(graph, "params", 0.95) == pytest.approx(1 - smallest[0] / graph.count({})[0], abs=1e-12)
    alone = graph.count({"g2": torch.arange(4)})
    assert largest(graph, "params", names=["g2"]) == pytest.approx(1 - alone[0] / graph.count({})[0], abs=1e-12)
    # 0.29 * 100 is 28.999... in floating point, and 29 channels are meant.
    assert largest(Chain([3, 100, 10]), "params", 0.29) == pytest.approx(0.29, abs=1e-12)
    check_ratio(graph, {"params": largest(graph, "params")})
    with pytest.raises(UserError, match="at most 0.9"):
        check_ratio(graph, {"params": 0.999})


def test_registered_kinds():
    assert {"global", "uniform"} <= set(ALLOCATIONS.names())


@pytest.mark.parametrize("arguments, words", [
    ({"budget": {"params": 0.999}}, ["cannot be reached", "at most 0.9"]),
    ({"budget": {"params": 1.0}}, ["[0, 1)"]),
    ({"budget": {"params": "half"}}, ["[0, 1)", "half"]),
    ({"budget": {"params": 0.5, "macs": 0.5}}, ["one entry"]),
    ({"budget": {"param": 0.5}}, ["did you mean 'params'"]),
    ({"budget": {"params": 0.5}, "kind": "globl"}, ["did you mean 'global'"]),
    ({"budget": {"params": 0.5}, "max_layer_ratio": 0.0}, ["max_layer_ratio"]),
    ({"budget": {"params": 0.5}, "round_to": 0}, ["round_to"]),
    ({"scores": {"g9": torch.zeros(4)}, "budget": {"params": 0.5}}, ["g9"]),
    ({"scores": {"g1": torch.zeros(4)}, "budget": {"params": 0.5}}, ["32 channels"]),
    ({"scores": {"g1": torch.full((32,), float("nan"))}, "budget": {"params": 0.5}}, ["g1", "not numbers"]),
])
def test_faults_are_one_sentence(arguments, words):
    graph = Chain([3, 32, 64, 10])
    with pytest.raises(UserError) as caught:
        allocate(graph, **{"scores": random_scores(graph)} | arguments)
    assert len(caught.value.faults) == 1 and all(word in str(caught.value) for word in words)


def test_a_network_of_pinned_groups_names_the_reasons():
    with pytest.raises(UserError, match="output of the network"):
        allocate(Chain([3, 10]), {}, {"macs": 0.3})
