"""Oracle: the choice of one published round (compress.decompose), counts of the materialised network, and moving averages by hand."""

import copy

import pytest
import torch
from torch.nn import functional

from compress import compress
from compress.decompose.budget import choice_for
from compress.decompose.reach import saved
from compress.decompose.rounds import EigenDamageOptions, scores
from compress.errors import UserError
from compress.graph import trace
from compress.methods import Context, method
from tests.compress.decompose.nets import network

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 4
KINDS = ["eigendamage", "eigendamage_depthwise", "improved_eigendamage"]


def cut(name, ratio, quantity="params", **options):
    return compress(network(), X[:1], [(X, Y)], method=name, budget={quantity: ratio}, recalibrate=False, options={"fisher": "exact"} | options)


def context(model, meta=None, original=None, **options):
    graph = trace(model, X[:1])
    return Context(model, graph, X[:1], [(X, Y)], functional.cross_entropy, torch.Generator().manual_seed(0), original=original or graph.count(),
                   options={"fisher": "exact"} | options, meta=meta or {})


@pytest.mark.parametrize("name", KINDS)
def test_the_pool_fraction_is_what_a_call_removes_where_the_ratio_asks_for_more(name):
    removed = []
    for fraction in (0.1, 0.3, 0.5):
        small, plan, report = cut(name, 0.97, pool_fraction=fraction)
        left = report.after.params - 0.03 * report.before.params
        assert plan.meta["missing"]["params"] == pytest.approx(left, abs=1)
        removed.append(report.params_removed)
    assert removed[0] < removed[1] < removed[2] < 0.97


def test_the_pool_fraction_of_a_call_is_the_published_one():
    options = EigenDamageOptions(fisher="exact", pool_fraction=0.4)
    entries = scores(network(), [(X, Y)], options)
    _, _, report = cut("eigendamage", 0.97, pool_fraction=0.4)
    assert report.before.params - report.after.params == saved(entries, choice_for(entries, options, None), options)[0]


@pytest.mark.parametrize("quantity", ["params", "macs"])
@pytest.mark.parametrize("name", KINDS)
def test_a_pool_fraction_that_is_large_enough_leaves_the_ratio_to_decide(name, quantity):
    _, plan, report = cut(name, 0.3, quantity, pool_fraction=0.9)
    assert "missing" not in plan.meta and report.ranks == cut(name, 0.3, quantity)[2].ranks


@pytest.mark.parametrize("name", KINDS)
def test_a_call_does_one_round_and_says_so(name):
    with pytest.raises(UserError, match="one round.*main_prune") as error:
        cut(name, 0.3, rounds=3)
    assert "\n" not in str(error.value)
    assert cut(name, 0.3, rounds=1)[2].ranks == cut(name, 0.3)[2].ranks
    assert method(name).rounds({}) is None and method(name).rounds({"rounds": 4}) == 4


@pytest.mark.parametrize(("name", "ratio", "options"), [("eigendamage", 0.99, {}), ("improved_eigendamage", 0.9, {}), ("eigendamage", 0.5, {"cap": 0.3})])
def test_what_no_scores_reach_is_refused_without_data(name, ratio, options):
    known = context(network(), **options)
    known.batches.clear()
    with pytest.raises(UserError, match="at most 0[.][0-9]+.*cap") as error:
        method(name).check_budget(known, {"params": ratio})
    assert "\n" not in str(error.value)
    # what the sentence names can be reached
    most = float(str(error.value).split("at most ")[1].split(" ")[0])
    method(name).check_budget(known, {"params": most - 1e-4})
    assert cut(name, most - 0.01, **options)[2].params_removed >= most - 0.01
    # a pool fraction says what a round does, and what it reaches is reported
    method(name).check_budget(context(network(), **options, pool_fraction=0.5), {"params": ratio})


def test_several_rounds_reach_more_than_one():
    chosen, known = method("improved_eigendamage"), context(network())
    with pytest.raises(UserError):
        chosen.check_rounds(known, "params", [0.75])
    chosen.check_rounds(known, "params", [0.4, 0.75])
    with pytest.raises(UserError, match="0.75 of the params in 1 round"):
        chosen.check_rounds(known, "params", [0.75, 0.76])


@pytest.mark.parametrize("decomposition", ["svd", "cp"])
def test_a_decomposition_that_cannot_grow_is_refused_where_it_would_have_to(decomposition):
    chosen = method("improved_eigendamage")
    with pytest.raises(UserError, match="cannot grow; set back_ratio to 0"):
        chosen.check_rounds(context(network(), decomposition=decomposition), "params", [0.1, 0.2])
    chosen.check_rounds(context(network(), decomposition=decomposition), "params", [0.2])
    chosen.check_rounds(context(network(), decomposition=decomposition, back_ratio=0), "params", [0.1, 0.2])
    assert chosen.growth({"back_ratio": 0}) is None
    assert chosen.growth({}) == (10.0, None) and chosen.growth({"growth_lr_factor": 2, "growth_milestones": [0.25]}) == (2.0, [0.25])
    with pytest.raises(UserError, match="growth_milestones.*fractions"):
        chosen.check({"growth_milestones": [1.5]})


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_shares_are_averaged_over_the_rounds_with_the_momentum(momentum):
    chosen, model, meta, fresh, seen = method("improved_eigendamage"), network(), {}, [], []
    original = trace(model, X[:1]).count()
    for ratio in (0.2, 0.4):
        alone = chosen.apply(copy.deepcopy(model), context(model, original=original, pool_momentum=0.0), None, {"params": ratio})
        meta = chosen.apply(model, context(model, meta, original, pool_momentum=momentum), None, {"params": ratio}).meta
        fresh.append(alone.meta["grow"]["shares"])
        seen.append(meta["grow"]["shares"])
    first, second = seen
    assert set(second) == set(fresh[1]) and any(name in first for name in second)
    for name, values in second.items():
        before = fresh[0].get(name, (0.0, 0.0))
        expected = [momentum * (1 - momentum) * a + (1 - momentum) * b for a, b in zip(before, fresh[1][name], strict=True)]
        assert values == pytest.approx(expected, rel=1e-9)


def test_growth_keeps_the_shares_for_the_next_round():
    chosen, model = method("improved_eigendamage"), network()
    cutting = chosen.apply(model, context(model), None, {"params": 0.4})
    original = trace(network(), X[:1]).count()
    growing = chosen.regrow(model, context(model, cutting.meta, original))
    assert growing.meta["grow"] == cutting.meta["grow"] and growing.steps


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cap", [0.2, 0.4])
def test_no_side_loses_more_than_the_cap(name, cap):
    _, _, report = cut(name, 0.97, cap=cap, pool_fraction=0.9, accept="params")
    if name == "eigendamage_depthwise":  # one rank on both sides: the smaller one
        assert all(min(kept) >= min(n - int(cap * n) for n in full) for full, kept in report.ranks.values())
    else:
        assert report.ranks and all(k >= n - int(cap * n) for full, kept in report.ranks.values() for n, k in zip(full, kept, strict=True))


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3])
def test_a_budget_is_met_where_layers_may_grow(ratio):
    _, _, report = cut("improved_eigendamage", ratio, allow_increase=True)
    assert report.params_removed >= ratio - 1 / report.before.params
    assert cut("improved_eigendamage", 0.0, allow_increase=True)[2].ranks == {}


@pytest.mark.parametrize("name", ["eigendamage", "improved_eigendamage"])
def test_the_uniform_allocation_removes_the_same_fraction_of_every_layer(name):
    arguments = {"method": name, "budget": {"params": 0.45}, "recalibrate": False, "options": {"fisher": "exact"}}
    shares = {}
    for allocation in ("global", "uniform"):
        net = network()
        _, _, report = compress(net, X[:1], [(X, Y)], allocation=allocation, **arguments)
        sizes = {layer: net.get_submodule(layer).weight.shape[:2] for layer in report.ranks}
        shares[allocation] = [1 - rank / size for layer, (_, ranks) in report.ranks.items() for rank, size in zip(ranks, sizes[layer], strict=True)]
        assert 0.45 <= report.params_removed < 0.55
    # a side of n entries can only lose multiples of 1 / n; the smallest one has three
    assert max(shares["uniform"]) - min(shares["uniform"]) <= 1 / 3 < max(shares["global"]) - min(shares["global"])
