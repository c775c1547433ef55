"""Oracle: a table of faulty arguments, each with the words that its one sentence has to hold; and what must not be refused."""

import copy

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.arguments import patterns
from compress.errors import UserError
from compress.graph import trace


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), *list(_net())[1:])


def _inference():
    with torch.inference_mode():
        return _net()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1])


@pytest.mark.parametrize("arguments, words", [
    ({"example_inputs": X[:0]}, ["[0, 3, 8, 8]", "no element"]),
    ({"example_inputs": X.to("meta")}, ["meta device"]),
    ({"model": _net().to("meta")}, ["'0.weight'", "meta device"]),
    ({"model": _inference()}, ["'0.weight'", "inference_mode"]),
    ({"model": _lazy()}, ["'0.weight'", "no shape yet"]),
    ({"model": "resnet20"}, ["str", "torch.nn.Module"]),
    ({"seed": 2**80}, ["seed", "64 bits"]),
    ({"seed": "a"}, ["seed", "'a'"]),
    ({"seed": True}, ["seed", "True"]),
    ({"exclude": [3]}, ["exclude", "3"]),
    ({"round_to": "8"}, ["round_to", "'8'"]),
    ({"max_layer_ratio": "x"}, ["max_layer_ratio", "'x'"]),
    ({"options": [1]}, ["options", "[1]"]),
    ({"method": 3}, ["method", "3"]),
    ({"loss_fn": "mse"}, ["loss_fn", "'mse'"]),
    ({"budget": {"macs": True}}, ["True", "[0, 1)"]),
    ({"budget": {"macs": float("nan")}}, ["nan", "[0, 1)"]),
    ({"method": "taylor_fo", "calibration": [(X[:0], Y[:0])]}, ["needs calibration data"]),
    ({"method": "taylor_fo", "calibration": 3}, ["calibration", "int"]),
])
def test_faulty_arguments_are_one_sentence(arguments, words):
    with pytest.raises(UserError) as caught:
        compress(**{"model": _net(), "example_inputs": X} | arguments)
    assert len(caught.value.faults) == 1 and all(word in str(caught.value) for word in words)


def test_several_faults_are_named_together():
    with pytest.raises(UserError) as caught:
        compress(_net(), X[:0], seed="a", round_to=0)
    assert len(caught.value.faults) == 3


def test_inference_mode_around_the_call_leaves_a_network_that_can_be_trained():
    with torch.inference_mode():
        x = X.clone()
        model = None
        with torch.inference_mode(False):
            model = _net()
        small, _, _ = compress(model, X, [(x, Y)], method="taylor_fo")
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("faulty, words", [(X[:0], "no element"), (X.to("meta"), "meta device")])
def test_tracing_refuses_examples_without_values(faulty, words):
    with pytest.raises(UserError, match=words):
        trace(_net(), faulty)


def test_patterns():
    assert patterns(None) == () and patterns("a.*") == ("a.*",) and patterns(["a", "b"]) == ("a", "b")


def test_saving_and_loading_refuse_in_one_sentence(tmp_path):
    small, plan, _ = compress(_net(), X)
    (tmp_path / "file").write_text("x")
    for arguments, words in [((small, plan, tmp_path / "file"), "File exists"), ((small, plan, tmp_path / "file" / "below"), "Not a directory"),
                             ((small, None, tmp_path / "a"), "NoneType"), ((small, plan, None), "no path"),
                             ((copy.deepcopy(small).to("meta"), plan, tmp_path / "a"), "meta device")]:
        with pytest.raises(UserError, match=words):
            save(*arguments)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="note=<object"):
        save(small, plan, tmp_path / "a", note=object())
    save(small, plan, tmp_path / "a", note={"accuracy": 0.5})
    for given, words in [(_net().to("meta"), "meta device"), (_lazy(), "no shape yet"), ("resnet20", "str")]:
        with pytest.raises(UserError, match=words):
            load(tmp_path / "a", given)
    with pytest.raises(UserError, match="no path"):
        load(None)
    torch.testing.assert_close(load(tmp_path / "a", _net())(X), small.eval()(X), rtol=0, atol=0)
