"""Oracle: exact counts of the materialised network (compress.cost), and cutting every side to the cap by hand."""

import copy

import pytest
import torch

from compress.cost import count
from compress.decompose.budget import choice_for
from compress.decompose.improved import CycleState, ImprovedOptions, cut, cycle_scores
from compress.decompose.reach import most, round_choice, saved
from compress.decompose.rounds import EigenDamageOptions, apply_round, scores, select
from compress.errors import UserError
from tests.compress.decompose.nets import batches, network

X = torch.cat([x for x, _ in batches()])
EXACT = {"fisher": "exact", "ekfac": False}
SHAPES = {"stem": (3, 8, 8), "a": (8, 8, 8), "b": (16, 4, 4), "short": (8, 8, 8), "hidden": (16,), "head": (12,)}


def params(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_a_pool_fraction_is_removed_until_it_would_meet_the_budget():
    net, options = network(), EigenDamageOptions(**EXACT, pool_fraction=0.4)
    entries = scores(net, batches(), options)
    published = choice_for(entries, options, None)
    (parameters, _) = saved(entries, published, options)
    assert parameters > 1000
    for needed in (parameters + 1, 10**9):
        assert str(round_choice(entries, options, (needed, 0)).kept) == str(published.kept)
    less = round_choice(entries, options, (parameters - 200, 0))
    assert parameters - 200 <= saved(entries, less, options)[0] < parameters
    unset = EigenDamageOptions(**EXACT)
    assert saved(entries, round_choice(entries, unset, (parameters + 1, 0)), unset)[0] > parameters
    with pytest.raises(UserError, match="at most"):
        round_choice(entries, unset, (10**9, 0))


@pytest.mark.parametrize("options", [
    EigenDamageOptions(**EXACT), EigenDamageOptions(**EXACT, depthwise=True), EigenDamageOptions(**EXACT, pool_fraction=0.5),
    ImprovedOptions(fisher="exact", allow_increase=True), ImprovedOptions(fisher="exact", allow_increase=True, decomposition="svd"),
], ids=["plain", "depthwise", "pool fraction", "increase", "increase svd"])
def test_nothing_needed_is_nothing_done(options):
    net = network()
    entries = (cycle_scores if isinstance(options, ImprovedOptions) else scores)(net, batches(), options)
    choice = round_choice(entries, options, (0, 0))
    assert apply_round(net, entries, choice.kept, options, split=choice.split) == [] and saved(entries, choice, options) == (0, 0)


@pytest.mark.parametrize("accept", ["both", "params"])
@pytest.mark.parametrize("cap", [0.3, 0.5, 0.95, 1.0])
def test_the_bound_of_one_round_is_what_the_largest_fraction_saves(cap, accept):
    net, options = network(), EigenDamageOptions(**EXACT, cap=cap, accept=accept, skip_last=False)
    entries = scores(net, batches(), options)
    before = count(copy.deepcopy(net).float(), X[:1].float())
    kept = select(entries, options, 1 - 1e-6)
    apply_round(net, entries, kept, options)
    after = count(net.float(), X[:1].float())
    bound = most(network(), SHAPES, options, 1)
    # the best row or column of all stays even where the cap would let it go
    assert bound[0] >= before.params - after.params and (cap == 1 or bound[0] == before.params - after.params)
    if accept == "both":
        assert bound[1] >= before.macs - after.macs and (cap == 1 or bound[1] == before.macs - after.macs)


def test_the_bound_of_several_rounds_is_met_by_cutting_to_the_cap_each_time():
    net, options = network(), ImprovedOptions(fisher="exact", cap=0.5)
    dense = params(net)
    for number in (1, 2, 3):
        cut(net, batches(), options.model_copy(update={"pool_fraction": 0.999}), CycleState())
        assert most(network(), SHAPES, options, number)[0] == dense - params(net)
