"""Oracle: plain tensor indexing, and the network's state before the step."""

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.surgery import apply_prune, cut


def test_cut_is_indexing():
    tensor = torch.arange(120).reshape(4, 5, 6)
    assert torch.equal(cut(tensor, {0: [1], 2: [0, 5]}), tensor[[0, 2, 3]][:, :, 1:5])


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()


def step(**changes):
    vectors = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    slices = {**{name: {"0": [1, 3]} for name in vectors}, "2.weight": {"1": [1, 3]}}
    attributes = {"0": {"out_channels": 2}, "1": {"num_features": 2}, "2": {"in_channels": 2}}
    return {"kind": "prune", "slices": slices | changes.get("slices", {}), "attributes": attributes | changes.get("attributes", {})}


def test_step_and_undo():
    model = network()
    state, text, grad = {k: v.clone() for k, v in model.state_dict().items()}, repr(model), torch.ones(4, 3, 1, 1)
    model[0].weight.grad = grad
    undo = apply_prune(model, step())
    assert model[0].weight.grad is None and repr(model) != text
    assert torch.equal(model[0].weight, state["0.weight"][[0, 2]]) and torch.equal(model[2].weight, state["2.weight"][:, [0, 2]])
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 2, 2, 2)
    undo()
    assert repr(model) == text and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is grad


@pytest.mark.parametrize("changes, words", [
    ({"slices": {"3.weight": {"0": [0]}}}, "'3.weight'"),
    ({"slices": {"0.weight": {"0": [4]}}}, "dimension 0 of '0.weight'"),
    ({"slices": {"0.weight": {"7": [0]}}}, "dimension 7 of '0.weight'"),
    ({"slices": {"0.weight": {"0": [1, 1]}}}, "dimension 0"),
    ({"slices": {"0.weight": {"0": [0, 1, 2, 3]}}}, "at least one must stay"),
    ({"attributes": {"0": {"width": 3}}}, "'width' of module '0'"),
    ({"attributes": {"9": {"out_channels": 3}}}, "module '9'"),
])
def test_a_step_that_does_not_fit_changes_nothing(changes, words):
    model = network()
    state, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    with pytest.raises(UserError, match=words) as caught:
        apply_prune(model, step(**changes))
    assert str(caught.value).count("\n") == 0
    assert repr(model) == text and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
