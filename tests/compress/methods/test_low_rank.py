"""Oracle: counts of the materialised network, tails of singular values, a planted low-rank network, and plain enumeration."""

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.cost import count
from compress.decompose import cp, recompose, svd, tucker2
from compress.decompose.modules import build_block, layer_cost
from compress.errors import UserError
from compress.methods import method, names
from compress.methods.low_rank import cp_bound
from compress.methods.menus import build_menu, choose, uniform
from models import build

LOW_RANK = ["svd", "tucker", "cp", "kfac_svd", "kfac_tucker", "eigendamage", "improved_eigendamage"]


def _calibration(size=16):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 3, size, size, generator=generator), torch.randint(0, 10, (32,), generator=generator))]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("resnet20", 10, width=0.5).eval()


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_the_budget_is_met_on_the_materialised_network_within_one_percent(network, name, quantity):
    batches = _calibration()
    small, _, report = compress(network, batches[0][0][:1], batches, method=name, budget={quantity: 0.3})
    removed = 1 - getattr(count(small, batches[0][0][:1]), quantity) / getattr(count(network, batches[0][0][:1]), quantity)
    assert -0.01 <= removed - 0.3 <= 0.03
    assert report.ranks and (name == "cp" or all(kept[0] <= full[0] and kept[1] <= full[1] for full, kept in report.ranks.values()))


@pytest.mark.parametrize("name", ["tucker", "kfac_tucker", "eigendamage"])
def test_a_factorized_network_is_saved_and_loaded_with_equal_outputs(network, name, tmp_path):
    batches = _calibration()
    x = batches[0][0]
    small, plan, _ = compress(network, x[:1], batches, method=name, budget={"macs": 0.4})
    save(small, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x), small(x))


def _planted(rank):
    """Two convolutions and a linear layer, the middle one of exactly this Tucker rank."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    core = torch.randn(rank, rank, 3, 3)
    left, right = torch.linalg.qr(torch.randn(16, rank))[0], torch.linalg.qr(torch.randn(16, rank))[0]
    with torch.no_grad():
        model[2].weight.copy_(torch.einsum("op,pqkl,cq->ockl", left, core, right))
    return model.eval()


@pytest.mark.parametrize("name", ["tucker", "kfac_tucker"])
def test_a_planted_low_rank_layer_is_found_and_factorized_without_loss(name):
    model, batches = _planted(4), _calibration(8)
    x = batches[0][0]
    block = 16 * 4 + 4 * 4 * 9 + 4 * 16
    total = count(model, x[:1]).macs
    # the budget leaves exactly one lossless way: the planted layer at its own rank
    ratio = (16 * 16 * 9 - block) * 64 / total
    small, _, report = compress(model, x[:1], batches, method=name, budget={"macs": ratio - 0.02})
    assert list(report.ranks) == ["2"]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_menu_costs_equal_the_counted_blocks():
    for layer, shape in ((nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 9)), (nn.Conv2d(6, 8, 1, stride=2, bias=False), (6, 8, 8)), (nn.Linear(12, 10), (5, 12))):
        largest = layer.weight.shape[:2]
        menu = build_menu("l", layer, shape, lambda ranks, layer=layer: tucker2(layer.weight, ranks), tuple(largest), lambda ranks: 0.0)
        assert len(menu.ranks) > 3 and menu.costs[0] == layer_cost(layer, shape)
        for ranks, cost in list(zip(menu.ranks, menu.costs))[1:]:
            assert layer_cost(build_block(layer, tucker2(layer.weight, ranks)), shape) == cost


def test_the_estimate_for_cp_bounds_its_error():
    generator = torch.Generator().manual_seed(0)
    weight = torch.einsum("or,cr,kr->ock", *(torch.randn(n, 6, generator=generator) for n in (8, 7, 9))).reshape(8, 7, 3, 3) + 0.1 * torch.randn(8, 7, 3, 3, generator=generator)
    bound = cp_bound(weight)
    assert bound[0] == pytest.approx(float(weight.double().square().sum())) and bound[-1] == 0
    for rank in (1, 3, 6, 12):
        error = float((recompose(cp(weight, rank)) - weight).double().square().sum())
        assert error <= float(bound[rank]) * (1 + 1e-3)


def test_global_loses_no_more_than_uniform_at_the_same_cost():
    torch.manual_seed(0)
    menus = []
    for width, noise in ((16, 0.01), (16, 1.0), (24, 0.3)):
        weight = torch.randn(width, 3) @ torch.randn(3, width) + noise * torch.randn(width, width)
        tail = torch.linalg.svdvals(weight).square().flip(0).cumsum(0).flip(0)
        layer = nn.Linear(width, width)
        menus.append(build_menu("l", layer, (width,), lambda ranks, weight=weight: svd(weight, ranks[0]), (width,),
                                lambda ranks, tail=tail: float(tail[ranks[0]]) if ranks[0] < len(tail) else 0.0))
    for share in (0.4, 0.6, 0.8):
        limit = share * sum(menu.costs[0][0] for menu in menus)
        losses = [sum(menu.losses[i] for menu, i in zip(menus, pick(menus, 0, limit))) for pick in (choose, uniform)]
        assert losses[0] <= losses[1] + 1e-9
        assert sum(menu.costs[i][0] for menu, i in zip(menus, choose(menus, 0, limit))) <= limit


def test_every_method_refuses_an_option_that_it_does_not_have_and_names_the_nearest():
    for name in names():
        with pytest.raises(UserError, match="no option 'fishr'"):
            method(name).check({"fishr": 1})


@pytest.mark.parametrize(("arguments", "words"), [
    ({"method": "svd", "budget": {"macs": 0.995}}, "budget"), ({"method": "kfac_tucker", "budget": {"macs": 0.3}}, "calibration"),
    ({"method": "svd", "exclude": ["*"]}, "can be factorized"),
])
def test_what_cannot_be_done_is_one_sentence(network, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        compress(network, torch.zeros(1, 3, 16, 16), **arguments)
    assert "\n" not in str(raised.value)


def test_excluded_layers_stay(network):
    small, _, report = compress(network, torch.zeros(1, 3, 16, 16), method="tucker", budget={"macs": 0.2}, exclude=["layer1.*", "layer2.0.*"])
    assert report.ranks and not any(name.startswith(("layer1.", "layer2.0.")) for name in report.ranks)
    assert torch.equal(small.layer1[0].conv1.weight, network.layer1[0].conv1.weight)


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize(("name", "options", "ratio"), [("eigendamage_depthwise", {}, 0.3), ("eigendamage_depthwise", {}, 0.5), ("eigendamage_depthwise", {}, 0.7),
                                                        ("improved_eigendamage", {"decomposition": "cp"}, 0.3)])
def test_a_depthwise_variant_splits_no_more_than_the_budget_needs(network, name, options, quantity, ratio):
    batches = _calibration()
    x = batches[0][0][:1]
    small, _, report = compress(network, x, batches, method=name, budget={quantity: ratio}, options=options)
    removed = 1 - getattr(count(small, x), quantity) / getattr(count(network, x), quantity)
    assert ratio <= removed <= ratio + 0.02
    assert any(getattr(small.get_submodule(name), "depthwise", False) for name in report.ranks)
