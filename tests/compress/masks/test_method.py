"""Oracle: `compress`, `save` and `load` around masks against `prune` called by hand."""

import copy

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.errors import UserError
from compress.masks import Masks, enforced, prune
from compress.methods import names
from compress.saliency import SALIENCY
from compress.siblings import own
from tests.compress.saliency.networks import data

BATCHES = [(x.mean(1, keepdim=True).float(), y) for x, y in data(torch.Generator().manual_seed(0))]
X = BATCHES[0][0]


def network():
    torch.manual_seed(3)
    return own("models").build("conv", 10, 1, image_size=8, width=4)


@pytest.mark.parametrize("criterion", SALIENCY.names())
def test_every_criterion_is_a_method(tmp_path, criterion):
    assert f"mask_{criterion}" in names()
    ratio = 0.2
    model = network()
    before = copy.deepcopy(model.state_dict())
    small, plan, _ = compress(model, X, BATCHES, method=f"mask_{criterion}", budget={"weights": ratio}, recalibrate=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    masks = Masks.of(small)
    assert masks.kept == -(-masks.total * 8 // 10) and plan.meta["mask"]["density"] == masks.density
    by_hand = Masks.attach(network())
    options = {"input_shape": (1, 8, 8)} if criterion == "synflow" else {}
    prune(by_hand, criterion, 1 - ratio, batches=BATCHES, generator=torch.Generator().manual_seed(0), options=options)
    assert all(torch.equal(by_hand[name], mask) for name, mask in masks.items())
    save(small, plan, tmp_path)
    again = load(tmp_path, network())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    assert Masks.of(again).kept == masks.kept


def test_options_and_errors():
    run = lambda method="mask_magnitude", ratio=0.5, **options: compress(
        network(), X, BATCHES, method=method, budget={"weights": ratio}, options=options
    )[0]
    assert Masks.of(run(scope="conv")).names == ["0.weight", "2.weight"]
    local = Masks.of(run(pool="local")).layer_density()
    assert set(local.values()) == {0.5}
    assert Masks.of(run(pattern="2:4", scope="conv"))["2.weight"].float().mean() == 0.5
    with pytest.raises(UserError, match="no option 'scop'.*did you mean 'scope'"):
        run(scop="conv")
    with pytest.raises(UserError, match="Unknown mask pattern"):
        run(pattern="diagonal")
    with pytest.raises(UserError, match="takes one of weights"):
        compress(network(), X, BATCHES, method="mask_magnitude", budget={"macs": 0.5})
    assert Masks.of(run("mask_grasp", temperature=1.0)).density == 0.5


def test_enforced_is_nothing_without_masks():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with enforced(model):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    masks = Masks.attach(model)
    masks.update({"weight": torch.tensor([[True, False], [True, True]])})
    with enforced(model):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert model.weight[0, 1] == 0 and (model.weight != 0).sum() == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scope": "conv", "residual": True}, "no scales on its skip paths"),
        ({"pattern": "vector-16", "biases": True}, "needs rows and columns, which '.*bias' has not"),
    ],
)
def test_scopes_are_checked_before_anything_is_pruned(options, sentence):
    with pytest.raises(UserError, match=sentence):
        compress(network(), X, BATCHES, method="mask_magnitude", budget={"weights": 0.5}, options=options)
