"""Oracle: the dense network, the closed-form losses, sorting by hand, and counts of the materialised network (compress.cost)."""

import copy

import pytest
import torch

from compress.cost import count
from compress.curvature import collect
from compress.curvature.quadratic import predicted_loss
from compress.decompose import FactorizedConv2d, recompose
from compress.decompose.eigen import depthwise, keep_coordinates
from compress.decompose.modules import dense_weight
from compress.decompose.budget import choice_for, eigendamage_round, fraction_for, split_loss, splits_for
from compress.decompose.rounds import (
    EigenDamageOptions,
    accepted,
    apply_round,
    proposal,
    scores,
    select,
)
from compress.decompose.selection import Sides, keep, normalized, pool, ranked, threshold
from compress.decompose.targets import targets
from compress.errors import RunError, UserError
from tests.compress.decompose.nets import batches, network

EXACT = EigenDamageOptions(fisher="exact", ekfac=False)
X = torch.cat([x for x, _ in batches()])


def test_threshold_keeps_what_is_strictly_above_the_kth_score():
    sides = {
        "a": Sides(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([2.0, 4.0])),
        "b": Sides(torch.tensor([10.0, 0.5]), torch.tensor([6.0])),
    }
    assert pool(sides).tolist() == [0.5, 1, 2, 3, 4, 5, 6, 10]
    kept = keep(sides, threshold(pool(sides), 0.5), 1.0)
    assert [kept["a"].rows.tolist(), kept["a"].columns.tolist(), kept["b"].rows.tolist(), kept["b"].columns.tolist()] == [
        [0],
        [1],
        [0],
        [0],
    ]
    nothing = keep(sides, threshold(pool(sides), 0.0), 1.0)
    assert nothing["a"].rows.tolist() == [0, 1, 2] and nothing["b"].rows.tolist() == [0, 1]


def test_cap_and_the_last_entry():
    sides = {
        "a": Sides(torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])),
        "b": Sides(torch.tensor([9.0, 8.0]), torch.tensor([7.0])),
    }
    kept = keep(sides, 5.0, 0.5)
    assert kept["a"].rows.tolist() == [0, 3] and len(kept["a"].columns) == 2 and kept["b"].columns.tolist() == [0]
    assert keep(sides, 100.0, 1.0)["a"].rows.tolist() == [0]


def test_normalisation_divides_each_side_by_its_own_sum():
    sides = normalized({"a": Sides(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))})
    assert sides["a"].rows.tolist() == [0.25, 0.75] and sides["a"].columns.tolist() == [0, 0]


def test_targets_are_all_layers_but_the_last_linear_one():
    assert list(targets(network())) == ["stem", "a", "b", "short", "hidden"]
    assert "head" in targets(network(), skip_last=False)
    assert list(targets(network(), exclude=["a", "sho*"])) == ["stem", "b", "hidden"]


def test_full_rank_blocks_reproduce_the_network():
    net = network()
    entries = scores(net, batches(), EXACT)
    for name, entry in entries.items():
        everything = Sides(*(torch.arange(n) for n in entry.weight.shape[:2]))
        torch.testing.assert_close(recompose(proposal(entry, everything, EXACT)), entry.weight, rtol=0, atol=1e-12)
    expected = net(X)
    assert apply_round(net, entries, select(entries, EXACT, 0.0), EXACT) == []
    assert torch.equal(net(X), expected)


def test_removing_rows_costs_half_their_importance():
    net = network()
    entry = scores(net, batches(), EXACT)["b"]
    factors = collect(net, batches(), fisher="exact", patch="channel", bias=False)["b"]
    kept = Sides(torch.arange(4, 16), torch.arange(16))
    change = recompose(proposal(entry, kept, EXACT)) - entry.weight
    torch.testing.assert_close(predicted_loss(change, factors.A, factors.G), entry.sides.rows[:4].sum() / 2)


def test_savings_are_those_of_the_materialised_network():
    net = network()
    before = count(net.float(), X[:1].float())
    net.double()
    for options in (EXACT, EXACT.model_copy(update={"depthwise": True}), EXACT.model_copy(update={"normalize": True})):
        entries = scores(net, batches(), options)
        for fraction in (0.3, 0.7):
            cut = copy.deepcopy(net)
            kept = select(entries, options, fraction)
            savings = accepted(entries, kept, options)
            assert apply_round(cut, entries, kept, options) == list(savings) != []
            after = count(cut.float(), X[:1].float())
            assert (before.params - after.params, before.macs - after.macs) == tuple(map(sum, zip(*savings.values(), strict=True)))


@pytest.mark.parametrize("needed", [(2000, 0), (0, 60000), (1500, 50000)])
def test_a_budget_is_met_with_the_smallest_fraction(needed):
    net = network()
    entries = scores(net, batches(), EXACT)
    fraction = fraction_for(entries, EXACT, needed)
    total = sum(entry.sides.rows.numel() + entry.sides.columns.numel() for entry in entries.values())

    def saved(value):
        return tuple(map(sum, zip((0, 0), *accepted(entries, select(entries, EXACT, value), EXACT).values(), strict=True)))

    assert all(have >= want for have, want in zip(saved(fraction), needed, strict=True))
    assert not all(have >= want for have, want in zip(saved(fraction - 1 / total), needed, strict=True))


def test_rounds_merge_into_the_outer_factors():
    net, options = network(), EXACT.model_copy(update={"pool_fraction": 0.4, "cap": 0.5})
    assert "b" in eigendamage_round(net, batches(), options)
    first = net.b
    before, widths = net(X), (first.input.in_channels, first.output.out_channels)
    entries = scores(net, batches(), options)
    everything = Sides(*(torch.arange(n) for n in entries["b"].weight.shape[:2]))
    merged = recompose(proposal(entries["b"], everything, options))
    torch.testing.assert_close(merged, dense_weight(first), rtol=0, atol=1e-12)
    assert apply_round(net, entries, select(entries, options, 0.0), options) == []
    torch.testing.assert_close(net(X), before)
    parameters = sum(p.numel() for p in net.parameters())
    eigendamage_round(net, batches(), options)
    second = net.b
    assert isinstance(second, FactorizedConv2d) and (second.input.in_channels, second.output.out_channels) == widths
    assert len(list(second.children())) == 3 and second.core.weight.numel() < first.core.weight.numel()
    assert sum(p.numel() for p in net.parameters()) < parameters
    torch.testing.assert_close(
        second.output.weight.flatten(1).T @ second.output.weight.flatten(1), torch.eye(second.core.out_channels, dtype=torch.float64)
    )


def test_depthwise_variant_merges_its_1x1_parts():
    net = network()
    changed = eigendamage_round(net, batches(), EXACT.model_copy(update={"depthwise": True, "pool_fraction": 0.3}))
    assert "b" in changed and "a" in changed
    core = net.b.core
    assert core.groups == core.in_channels == core.out_channels and len(list(net.b.children())) == 3
    assert net.a.core.stride == (2, 2) and torch.isfinite(net(X)).all()
    assert "b" not in targets(net)


def test_options_change_what_they_say():
    net = network()
    fixed = copy.deepcopy(net)
    eigendamage_round(fixed, batches(), EXACT.model_copy(update={"fix_rotation": True}))
    assert not fixed.b.input.weight.requires_grad and not fixed.b.output.weight.requires_grad and fixed.b.core.weight.requires_grad
    assert fixed.b.output.bias.requires_grad
    pixel = scores(net, batches(), EXACT.model_copy(update={"use_patch": False}))["b"]
    window = scores(net, batches(), EXACT)["b"]
    assert not torch.allclose(pixel.spectra[0].values, window.spectra[0].values)
    corrected = scores(net, batches(), EXACT.model_copy(update={"ekfac": True}))["b"]
    assert not torch.allclose(corrected.sides.rows, window.sides.rows)
    labels = scores(net, batches(), EXACT.model_copy(update={"fisher": "empirical"}))["b"]
    assert not torch.allclose(labels.spectra[1].values, window.spectra[1].values)
    published = EXACT.model_copy(update={"accept": "params", "cap": 1.0})
    entries = scores(net, batches(), published)
    for name, (parameters, _) in accepted(entries, select(entries, published, 0.4), published).items():
        assert parameters >= 0, name


def test_ekfac_importances_use_the_exact_second_moments():
    net = network()
    entry = scores(net, batches(), EXACT.model_copy(update={"ekfac": True}))["b"]
    factors = collect(net, batches(), fisher="exact", patch="channel", bias=False, ekfac=True)["b"]
    q_a, q_g = (spectrum.vectors for spectrum in entry.spectra)
    rotated = torch.einsum("ockl,op,cq->pqkl", entry.weight, q_g, q_a).flatten(2)
    torch.testing.assert_close(entry.sides.columns, (rotated.square() * factors.second).sum((0, 2)))


@pytest.mark.parametrize("call, kind, words", [
    (lambda: eigendamage_round(network(), [], EXACT), UserError, "No image"),
    (lambda: eigendamage_round(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2).double()), batches(), EXACT), UserError, "No layer"),
    (lambda: fraction_for(scores(network(), batches(), EXACT), EXACT, (10**9, 0)), UserError, "at most"),
    (lambda: eigendamage_round(network(), [(x * float("nan"), y) for x, y in batches()], EXACT), RunError, "'stem'"),
    (lambda: threshold(torch.ones(3), 1.0), UserError, "1.0"),
    (lambda: keep({}, 1.0, 0.0), UserError, "0.0"),
])
def test_bad_input_is_one_sentence(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_image_and_dead_layers_give_a_working_network():
    net = network()
    with torch.no_grad():
        net.a.weight.zero_()
    eigendamage_round(net, [(X[:1], torch.tensor([0]))], EXACT)
    assert torch.isfinite(net(X)).all()


@pytest.mark.parametrize("way", ["cp", "svd"])
def test_under_a_budget_the_cheapest_layers_are_split_and_no_more_than_it_needs(way):
    net, options = network(), EXACT.model_copy(update={"depthwise": way})
    entries = scores(net, batches(), options)
    everything = select(entries, options, 0.0)
    savings = accepted(entries, everything, options)
    most = sum(parameters for parameters, _ in savings.values())
    for name, entry in entries.items():
        if name in savings:
            split = depthwise(keep_coordinates(entry.weight, *(spectrum.vectors for spectrum in entry.spectra), *everything[name]), method=way)
            factors = collect(net, batches(), fisher="exact", patch="channel", bias=False)[name]
            expected = predicted_loss(recompose(split) - entry.weight, factors.A, factors.G).item()
            assert split_loss(entry, way) == pytest.approx(expected, rel=1e-3)
    order = sorted(savings, key=lambda name: split_loss(entries[name], way) / savings[name][0])
    # enough for the first layer of this order, not for the first two
    wanted = savings[order[0]][0] + savings[order[1]][0] // 2
    assert splits_for(entries, options, (wanted, 0)) >= {order[0]} and order[1] not in splits_for(entries, options, (wanted, 0))
    kept, chosen = choice_for(entries, options, (wanted, 0))
    assert wanted <= sum(parameters for parameters, _ in accepted(entries, kept, options, chosen).values()) < savings[order[0]][0] + savings[order[1]][0]
    # as published once splitting everything is not enough
    assert splits_for(entries, options, (most + 1, 0)) is None and choice_for(entries, options, None).split is None
    changed = apply_round(net, entries, kept, options, split=chosen)
    forms = {name: getattr(net.get_submodule(name), "depthwise", False) for name in changed}
    assert forms[order[0]] and {name for name, form in forms.items() if form} <= chosen
    assert torch.isfinite(net(X)).all()


def test_places_cut_every_side_alike_in_the_order_of_its_own_scores():
    generator = torch.Generator().manual_seed(0)
    scores = {f"{n}": Sides(torch.rand(n, generator=generator) * 10**n, torch.rand(2 * n + 1, generator=generator)) for n in range(1, 9)}
    places = ranked(scores)
    values = pool(places)
    alike = pool(ranked({name: Sides(torch.rand(7, generator=generator), torch.rand(7, generator=generator)) for name in "abcde"}))
    assert len(alike.unique()) == len(alike) == 70
    for removed in range(len(values)):
        limit = threshold(values, removed / len(values))
        kept = keep(places, limit, 1.0)
        for name, sides in kept.items():
            for score, index in zip(scores[name], sides, strict=True):
                assert sorted(index.tolist()) == sorted(score.argsort()[-len(index):].tolist())
                assert abs((1 - len(index) / len(score)) - max(limit, 0)) <= 1 / len(score) + 1e-9
