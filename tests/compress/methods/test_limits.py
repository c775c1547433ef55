"""Oracle: the network itself (nothing asked for), finite outputs (degenerate data), and errors of one sentence."""

import pytest
import torch
from torch import nn

from compress import compress
from compress.errors import CompressError
from compress.methods import method, names
from tests.compress.decompose.nets import network

FACTORIZING = ["svd", "tucker", "cp", "kfac_svd", "kfac_tucker", "eigendamage", "eigendamage_depthwise", "improved_eigendamage"]
MEASURING = [name for name in names() if method(name).needs_data and "macs" in method(name).budgets]
X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 4


def cut(model, name, batches, ratio=0.3):
    return compress(model, X[:1], batches, method=name, budget={"params": ratio}, recalibrate=False)


@pytest.mark.parametrize("name", FACTORIZING)
def test_ratio_zero_keeps_every_module_as_it_is_and_so_does_its_repetition(name):
    model = network()
    small, plan, report = cut(model, name, [(X, Y)], 0.0)
    assert report.ranks == {} and plan.steps[0]["layers"] == {}
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in model.state_dict().items())
    once, _, _ = cut(model, name, [(X, Y)])
    again, _, _ = cut(once, name, [(X, Y)], 0.0)
    assert list(again.state_dict()) == list(once.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in once.state_dict().items())


@pytest.mark.parametrize("name", ["svd", "tucker", "kfac_svd", "kfac_tucker", "eigendamage", "improved_eigendamage"])
def test_a_factorized_network_is_factorized_further(name):
    once, _, first = cut(network(), name, [(X, Y)], 0.2)
    twice, _, second = cut(once, name, [(X, Y)], 0.2)
    assert second.after.params <= 0.8 * second.before.params + 1 and second.before.params == first.after.params
    assert all(second.ranks[layer][1] <= ranks for layer, (_, ranks) in first.ranks.items() if layer in second.ranks)
    assert torch.isfinite(twice(X)).all()


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize("batches", [[(X[:1], Y[:1])], [(torch.zeros_like(X), Y)], [(torch.ones_like(X), torch.zeros_like(Y))]],
                         ids=["one image", "black images", "one image and label many times"])
def test_degenerate_data_gives_a_working_network(name, batches):
    small, _, report = cut(network(), name, batches)
    assert report.params_removed >= 0.28 and torch.isfinite(small(X)).all()


@pytest.mark.parametrize("name", MEASURING)
def test_images_that_are_not_a_number_are_one_sentence(name):
    bad = X.clone()
    bad[3, 0, 2, 2] = float("nan")
    with pytest.raises(CompressError) as error:
        cut(network(), name, [(bad, Y)])
    assert "\n" not in str(error.value) and any(word in str(error.value) for word in ("NaN", "finite"))


class Unused(nn.Module):
    """A network with a layer that no image reaches."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = network(), nn.Conv2d(16, 16, 3).double()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("name", MEASURING)
def test_a_layer_without_data_stays_or_is_named(name):
    model = Unused().eval()
    try:
        small, _, _ = compress(model, X[:1], [(X, Y)], method=name, budget={"params": 0.2}, recalibrate=False)
    except CompressError as error:
        assert "'spare'" in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(small.spare.weight, model.spare.weight) and torch.isfinite(small(X)).all()


def test_eigendamage_measures_its_second_moments_unless_told_not_to():
    model = network()
    ranks = [compress(model, X[:1], [(X, Y)], method="eigendamage", budget={"params": 0.4}, recalibrate=False, options=options)[2].ranks
             for options in ({"fisher": "exact"}, {"fisher": "exact", "ekfac": True}, {"fisher": "exact", "ekfac": False})]
    assert ranks[0] == ranks[1] != ranks[2]
    for option in ("ekfac", "depthwise"):
        with pytest.raises(CompressError, match=f"Option '{option}' of method 'improved_eigendamage'.*decomposition"):
            compress(model, X[:1], [(X, Y)], method="improved_eigendamage", budget={"params": 0.3}, options={option: True})
