"""Oracle: enumeration of every combination of menu entries, direct errors of the decompositions, and counts of the materialised network."""

import copy
import itertools

import pytest
import torch

from compress.cost import count
from compress.curvature.quadratic import predicted_loss
from compress.decompose import recompose
from compress.decompose.ranks import METHODS, Choice, RankOptions, choose, decompose, low_rank, menu, statistics
from compress.errors import UserError
from tests.compress.decompose.nets import batches, network

X = batches()[0][0][:1]
OPTIONS = RankOptions(steps=6, fisher="exact")


def cost(model):
    total = count(copy.deepcopy(model).float(), X.float())
    return total.params, total.macs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("needed", [(1500, 0), (0, 30000), (1000, 30000)])
def test_budgets_are_met_with_exactly_the_counted_cost(method, needed):
    net = network()
    before = cost(net)
    expected = net(X)
    chosen = low_rank(net, batches(), method, needed, OPTIONS)
    after = cost(net)
    saved = before[0] - after[0], before[1] - after[1]
    assert saved[0] >= needed[0] and saved[1] >= needed[1] and chosen
    factors = statistics(network(), batches(), method, OPTIONS)
    menus = {name: menu(network().get_submodule(name), method, entry, OPTIONS)[0] for name, entry in factors.items()}
    assert saved == (sum(menus[n].parameters - c.parameters for n, c in chosen.items()), sum(menus[n].macs - c.macs for n, c in chosen.items()))
    assert torch.isfinite(net(X)).all() and not torch.equal(net(X), expected)


@pytest.mark.parametrize("mode", ["output", "input", "spatial"])
@pytest.mark.parametrize("method", ["svd", "kfac_svd"])
def test_svd_menus_hold_the_true_losses(method, mode):
    net, options = network(), OPTIONS.model_copy(update={"mode": mode, "ekfac": False})
    entry = statistics(net, batches(), method, options)["b"]
    weight = net.b.weight.detach()
    for choice in menu(net.b, method, entry, options)[1:]:
        change = recompose(decompose(weight, method, choice.ranks, entry, options)) - weight
        if method == "svd":
            assert choice.loss == pytest.approx((change.square().sum() / weight.square().sum()).item(), rel=1e-8)
        elif mode == "output":
            assert choice.loss == pytest.approx(predicted_loss(change, entry.A, entry.G).item(), rel=5e-2, abs=1e-9)


@pytest.mark.parametrize("method", ["tucker", "kfac_tucker"])
def test_tucker_menus_bound_the_true_losses(method):
    net, options = network(), OPTIONS.model_copy(update={"ekfac": False})
    entry = statistics(net, batches(), method, options)["b"]
    weight = net.b.weight.detach()
    channel = statistics(net, batches(), "tucker", options)["b"].A
    for choice in menu(net.b, method, entry, options)[1:]:
        if method == "tucker":
            change = recompose(decompose(weight, method, choice.ranks, entry, options)) - weight
            assert (change.square().sum() / weight.square().sum()).item() <= choice.loss * (1 + 1e-9)
        else:
            from compress.decompose import kfac_tucker2

            change = recompose(kfac_tucker2(weight, entry.A, entry.G, choice.ranks, refit=False)) - weight
            assert predicted_loss(change, channel, entry.G).item() <= choice.loss * (1 + 1e-9)


def test_cp_gives_layers_similar_shares():
    net = network(width=16)
    needed = tuple(total // 2 for total in cost(net))
    chosen = low_rank(net, batches(), "cp", (needed[0], 0), RankOptions(steps=64))
    dense = network(width=16)
    shares = [chosen[name].parameters / sum(p.numel() for p in dense.get_submodule(name).parameters()) for name in ("a", "b", "short")]
    assert max(shares) - min(shares) < 0.2


def test_choice_is_as_good_as_enumeration_up_to_the_hull():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        menus = {}
        for name in "abc":
            losses = torch.rand(5, generator=generator).sort(descending=True).values.tolist()
            sizes = torch.randint(10, 90, (5,), generator=generator).sort().values.tolist()
            menus[name] = [Choice(None, 0.0, 100, 1000)] + [Choice((i,), loss, size, 10 * size) for i, (loss, size) in enumerate(zip(losses, sizes, strict=True))]
        needed = (120, 1200)
        best = min(sum(c.loss for c in combo) for combo in itertools.product(*menus.values()) if 300 - sum(c.parameters for c in combo) >= 120)
        chosen = choose(menus, needed)
        assert 300 - sum(c.parameters for c in chosen.values()) >= 120
        assert best - 1e-12 <= sum(c.loss for c in chosen.values()) <= best + 0.35
    assert all(choice.ranks is None for choice in choose(menus, (0, 0)).values())


def test_a_second_call_decomposes_the_products_again():
    net = network()
    low_rank(net, batches(), "tucker", (1000, 0), OPTIONS)
    before = cost(net)
    low_rank(net, batches(), "tucker", (300, 0), OPTIONS)
    assert before[0] - cost(net)[0] >= 300


@pytest.mark.parametrize("call, words", [
    (lambda: low_rank(network(), batches(), "tuckr", (1, 0)), "'tuckr'"),
    (lambda: low_rank(network(), batches(), "svd", (10**9, 0), OPTIONS), "smallest ranks save"),
    (lambda: low_rank(torch.nn.Sequential(torch.nn.Linear(3, 3)), batches(), "svd", (1, 0)), "No layer"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
