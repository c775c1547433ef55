"""Oracle: the network that surgery leaves, counted on a real forward pass; and groups written down by hand for a small residual network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.allocate import allocate, largest
from compress.cost import count
from compress.criteria import CRITERIA
from compress.errors import UserError
from compress.graph import trace
from compress.siblings import own
from tests.compress.criteria.nets import make_batches, make_graph, make_net

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = own("models").build("resnet20", 10)
    return model, trace(model, EXAMPLE), count(model, EXAMPLE)


def removed_share(before, after, quantity):
    return 1 - getattr(after, quantity) / getattr(before, quantity)


@pytest.mark.parametrize("kind", ["global", "uniform"])
@pytest.mark.parametrize("quantity, ratio", [("params", 0.3), ("macs", 0.5), ("params", 0.7), ("macs", 0.9)])
def test_the_cut_network_meets_the_budget(traced, kind, quantity, ratio):
    model, graph, before = traced
    removed = allocate(graph, CRITERIA["l2"].score(graph, model), {quantity: ratio}, kind)
    cut = copy.deepcopy(model)
    graph.prune(cut, removed, verify=False)
    assert abs(removed_share(before, count(cut, EXAMPLE), quantity) - ratio) <= 0.01


@pytest.mark.parametrize("kind", ["global", "uniform"])
def test_rounded_widths_of_the_cut_network(traced, kind):
    model, graph, before = traced
    removed = allocate(graph, CRITERIA["l1"].score(graph, model), {"macs": 0.5}, kind, round_to=8)
    cut = copy.deepcopy(model)
    graph.prune(cut, removed, verify=False)
    assert 0.5 <= removed_share(before, count(cut, EXAMPLE), "macs") <= 0.6
    widths = [m.out_channels for m in cut.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths) and min(widths) < 16


def test_the_largest_ratio_is_reached_and_not_passed(traced):
    model, graph, before = traced
    scores, most = CRITERIA["l1"].score(graph, model), largest(graph, "params", 0.5)
    cut = copy.deepcopy(model)
    graph.prune(cut, allocate(graph, scores, {"params": most}, max_layer_ratio=0.5), verify=False)
    assert removed_share(before, count(cut, EXAMPLE), "params") == pytest.approx(most, abs=1e-12)
    with pytest.raises(UserError, match="cannot be reached"):
        allocate(graph, scores, {"params": most + 0.02}, max_layer_ratio=0.5)


def test_excluded_layers_leave_less_to_reach(traced):
    model, graph, _ = traced
    assert largest(trace(model, EXAMPLE, exclude=("layer3.*",)), "params") < 0.5 < largest(graph, "params")


def as_set(graph):
    return {(g.size, frozenset((m.parameter, m.dim, m.role, tuple(map(tuple, m.indices.tolist()))) for m in g.members))
            for g in graph.groups if g.prunable}


def test_the_groups_written_by_hand_are_those_of_the_trace():
    assert as_set(make_graph()) == as_set(trace(make_net(), make_batches()[0][0]))


@pytest.mark.parametrize("name", ["random", "l1", "l2", "bn_scale", "geometric_median", "taylor_fo", "taylor_2016"])
def test_every_criterion_scores_a_traced_network(name):
    net, batches = make_net(), make_batches()
    graph = trace(net, batches[0][0])
    by_size = {g.size: g.name for g in graph.groups if g.prunable}
    scores = CRITERIA[name].score(graph, net, batches, cross_entropy, torch.Generator().manual_seed(0))
    expected = CRITERIA[name].score(make_graph(), net, batches, cross_entropy, torch.Generator().manual_seed(0))
    assert torch.allclose(scores[by_size[4]], expected["conv1.weight"], rtol=1e-12)
    assert torch.allclose(scores[by_size[6]], expected["conv2.weight"], rtol=1e-12)


def test_a_pruned_network_can_be_scored_and_pruned_again(traced):
    model, graph, before = traced
    cut = copy.deepcopy(model)
    for ratio in (0.4, 0.7):
        graph = trace(cut, EXAMPLE)
        scores = CRITERIA["l1"].score(graph, cut)
        graph.prune(cut, allocate(graph, scores, {"params": ratio}, original=before.params), verify=False)
        assert abs(removed_share(before, count(cut, EXAMPLE), "params") - ratio) <= 0.01
