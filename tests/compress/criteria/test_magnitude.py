"""Oracle: the formulas of l1, l2, geometric_median and bn_scale as explicit loops over channels and elements in float64."""

from __future__ import annotations

import math

import pytest
import torch

from compress.criteria import CRITERIA
from compress.errors import UserError
from tests.compress.criteria.nets import Group, Graph, Member, make_graph, make_net


def rows_of(net, name, dim, indices):
    """The elements of each channel's slice, as lists of floats."""
    weight = net.get_parameter(name).detach()
    return [[float(v) for i in row for v in weight.select(dim, int(i)).flatten()] for row in indices]


def l1(rows):
    return [sum(abs(v) for v in row) for row in rows]


def l2(rows):
    return [math.sqrt(sum(v * v for v in row)) for row in rows]


def geometric_median(rows):
    return [sum(math.dist(a, b) for b in rows) for a in rows]


FORMULAS = {"l1": l1, "l2": l2, "geometric_median": geometric_median}
NORMS = {"none": lambda v: 1.0, "l2": lambda v: math.sqrt(sum(x * x for x in v)), "mean": lambda v: sum(v) / len(v), "max": max, "sum": sum}
AGGREGATES = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max}


def by_loops(net, formula, normalize, aggregate, roles):
    result = {}
    for group in make_graph().groups[:2]:
        layers = []
        for member in group.members:
            if member.role in roles:
                values = formula(rows_of(net, member.parameter, member.dim, member.indices))
                layers.append([v / NORMS[normalize](values) for v in values])
        result[group.name] = [AGGREGATES[aggregate](values) for values in zip(*layers)]
    return result


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("options", [{}, {"normalize": "none", "aggregate": "sum"}, {"normalize": "l2", "aggregate": "max"},
                                     {"normalize": "max", "consumers": True}, {"normalize": "sum"}])
def test_equals_the_loops(name, options):
    net = make_net()
    settings = {"normalize": "mean", "aggregate": "mean"} | {k: v for k, v in options.items() if k != "consumers"}
    expected = by_loops(net, FORMULAS[name], **settings, roles=("out", "in") if options.get("consumers") else ("out",))
    scores = CRITERIA[name].score(make_graph(), net, **options)
    assert set(scores) == {"conv1.weight", "conv2.weight"}
    for group, values in expected.items():
        assert scores[group].dtype == torch.float64
        assert scores[group].tolist() == pytest.approx(values, rel=1e-10)


@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_bn_scale(normalize):
    net = make_net()
    scores = CRITERIA["bn_scale"].score(make_graph(), net, normalize=normalize)
    layers = {name: net.get_submodule(name).weight.detach().abs().tolist() for name in ("bn1", "bn2", "bn3")}
    scaled = {name: [v / NORMS[normalize](values) for v in values] for name, values in layers.items()}
    assert scores["conv2.weight"].tolist() == pytest.approx(scaled["bn2"])
    assert scores["conv1.weight"].tolist() == pytest.approx([(a + b) / 2 for a, b in zip(scaled["bn1"], scaled["bn3"])])


@pytest.mark.parametrize("name", FORMULAS)
def test_scaling_a_layer_changes_nothing_after_normalisation(name):
    net = make_net()
    before = CRITERIA[name].score(make_graph(), net)
    net.conv3.weight.data *= 37.0
    after = CRITERIA[name].score(make_graph(), net)
    assert all(torch.allclose(before[group], after[group], rtol=1e-12) for group in before)


def test_geometric_median_finds_the_duplicate():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    layer = CRITERIA["geometric_median"].layer
    assert layer(weight).tolist() == pytest.approx([2 + math.hypot(9, 9), 1 + math.hypot(8, 9), 1 + math.hypot(8, 9),
                                                    math.hypot(9, 9) + 2 * math.hypot(8, 9)])


def test_geometric_median_in_blocks_and_far_from_the_origin():
    rows = torch.randn(300, 3, dtype=torch.float64)
    expected = (rows[:, None] - rows[None]).norm(dim=2).sum(1)
    assert torch.allclose(CRITERIA["geometric_median"].layer(rows), expected, rtol=1e-7)
    assert torch.allclose(CRITERIA["geometric_median"].layer(rows + 1e6), expected, rtol=1e-7)


def test_random_is_reproducible_and_leaves_the_global_generator_alone():
    net = make_net()
    state = torch.get_rng_state()
    first, second = (CRITERIA["random"].score(make_graph(), net, generator=torch.Generator().manual_seed(s)) for s in (3, 3))
    other = CRITERIA["random"].score(make_graph(), net, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[g], second[g]) and not torch.equal(first[g], other[g]) for g in first)
    assert len(set(first["conv2.weight"].tolist())) == 6 and all(0 <= v < 1 for v in first["conv2.weight"])
    with pytest.raises(UserError, match="generator"):
        CRITERIA["random"].score(make_graph(), make_net())


def test_a_dead_layer_scores_zero_rather_than_nan():
    net = make_net()
    net.conv2.weight.data.zero_()
    assert CRITERIA["l1"].score(make_graph(), net)["conv2.weight"].tolist() == [0.0] * 6


def test_frozen_weights_are_scored_and_nothing_changes():
    net = make_net().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name in (*FORMULAS, "bn_scale"):
        assert len(CRITERIA[name].score(make_graph(), net)) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training


def test_nan_weights_are_named():
    net = make_net()
    net.conv2.weight.data[2, 1] = float("nan")
    for name in FORMULAS:
        with pytest.raises(UserError, match="'conv2.weight'"):
            CRITERIA[name].score(make_graph(), net)


def test_a_group_without_a_norm_is_refused_or_kept():
    graph = make_graph()
    graph.groups[1].members = [m for m in graph.groups[1].members if "bn2" not in m.parameter]
    with pytest.raises(UserError, match="'conv2.weight'.*no BatchNorm"):
        CRITERIA["bn_scale"].score(graph, make_net())
    with pytest.raises(UserError, match="'conv2.weight'.*no BatchNorm"):
        CRITERIA["bn_scale"].check(graph, make_net())
    assert CRITERIA["bn_scale"].check(graph, make_net(), missing="keep") == ["conv1.weight"]
    assert set(CRITERIA["bn_scale"].score(graph, make_net(), missing="keep")) == {"conv1.weight"}


@pytest.mark.parametrize("options, words", [({"normalise": "mean"}, "did you mean 'normalize'"), ({"normalize": "median"}, "'median'"),
                                            ({"consumers": "perhaps"}, "'consumers'")])
def test_wrong_options_are_one_sentence(options, words):
    with pytest.raises(UserError, match=words) as caught:
        CRITERIA["l1"].score(make_graph(), make_net(), **options)
    assert len(caught.value.faults) == 1


def test_every_criterion_is_registered_under_its_name():
    names = {"random", "l1", "l2", "bn_scale", "geometric_median", "taylor_2016", "taylor_fo"}
    assert names <= set(CRITERIA.names())
    assert all(CRITERIA[name].name == name for name in CRITERIA)
    assert {name for name in names if CRITERIA[name].needs_data} == {"taylor_2016", "taylor_fo"}


def test_a_member_with_several_indices_per_channel_is_one_slice():
    weight = torch.nn.Linear(2, 6, bias=False).double()
    graph = Graph([Group("weight", 3, [Member("weight", 0, torch.tensor([[0, 3], [1, 4], [2, 5]]), "out")])])
    scores = CRITERIA["l1"].score(graph, weight, normalize="none")
    assert scores["weight"].tolist() == pytest.approx([float(weight.weight[[c, c + 3]].detach().abs().sum()) for c in range(3)])
