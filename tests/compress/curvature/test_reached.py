"""Oracle: which layers a gradient reaches, known by construction; snapshots of what must stay as it is."""

import pytest
import torch
from torch import nn

from compress.curvature import collect, ekfac, squared_gradients
from compress.errors import UserError
from tests.compress.curvature.nets import convnet, mlp, randn
from tests.compress.curvature.test_collect import assert_untouched, differing, snapshot


class Net(nn.Module):
    def __init__(self, fault):
        super().__init__()
        torch.manual_seed(0)
        self.fault, self.a, self.b, self.head = fault, nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        if self.fault == "functional":
            x = nn.functional.conv2d(x, self.a.weight, self.a.bias)
        elif self.fault == "no_grad":
            with torch.no_grad():
                x = self.a(x)
        elif self.fault == "detach":
            x = self.a(x).detach()
        else:
            self.a(x)
            x = torch.cat([x, x], 1)[:, :, 1:-1, 1:-1]
        return self.head(torch.relu(self.b(torch.relu(x))).mean((2, 3)))


@pytest.mark.parametrize("fault", ["no_grad", "detach", "unused"])
def test_a_layer_without_gradients_is_named(fault):
    net, x = Net(fault), randn(3, 2, 8, 8)
    rest = collect(net, [x], layers=["b", "head"], ekfac=True)
    calls = [lambda: collect(net, [x]), lambda: collect(net, [x], layers=["a", "b"]), lambda: collect(net, [x], sharing="reduce"),
             lambda: squared_gradients(net, [x], ["b", "a"]), lambda: ekfac(net, [x], collect(Net("functional"), [x]) | {"a": factors_of_a()})]
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == (
            "No gradient reached layer 'a' (it runs without gradients, outside its module, or its output is unused); exclude it."
        )
    assert set(squared_gradients(net, [x])) == {"b", "head"} == set(rest)


def factors_of_a():
    class Whole(Net):
        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    return collect(Whole(None), [randn(3, 2, 8, 8)])["a"]


def test_a_layer_called_outside_its_module_is_named_if_asked_for():
    net, x = Net("functional"), randn(3, 2, 8, 8)
    assert set(collect(net, [x])) == {"b", "head"} == set(squared_gradients(net, [x]))
    with pytest.raises(UserError, match=r"Layer 'a' was named .* exclude it\.$"):
        collect(net, [x], layers=["a"])
    with pytest.raises(UserError, match=r"No gradient reached layer 'a' .* exclude it\.$"):
        squared_gradients(net, [x], ["a"])


def test_gradients_that_are_zero_have_arrived():
    net, x = mlp(), randn(5, 4)
    with torch.no_grad():
        net[0].bias.fill_(-100)
    factors = collect(net, [x], ekfac=True)["0"]
    assert factors.G.abs().max() == 0 and factors.second.abs().max() == 0
    assert squared_gradients(net, [x])["0"].abs().max() == 0


def test_inputs_that_ask_for_gradients_and_inference_mode_change_nothing():
    net, x = convnet(), randn(4, 2, 8, 9)
    expected, squares = collect(net, [x], ekfac=True), squared_gradients(net, [x])
    assert not differing(expected, collect(net, [x.clone().requires_grad_()], ekfac=True))
    with torch.inference_mode():
        inputs = x.clone()
        found = collect(net, [inputs], ekfac=True)
        assert all(torch.equal(value, squares[name]) for name, value in squared_gradients(net, [inputs]).items())
    assert not differing(expected, found)
    assert not differing(expected, collect(net, [inputs], ekfac=True))
    assert not any(tensor.is_inference() for entry in found.values() for tensor in (entry.A, entry.G, entry.second))


def test_a_network_made_in_inference_mode_is_one_sentence():
    with torch.inference_mode():
        net = mlp()
    for call in (collect, squared_gradients):
        with pytest.raises(UserError, match="'0.weight' of the network was made under torch.inference_mode"):
            call(net, [randn(3, 4)])


class Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("the user's own fault")


class Drawing(nn.Module):
    """Draws random numbers in evaluation mode, and may raise in the backward pass."""

    def __init__(self, faulty):
        super().__init__()
        self.inner, self.faulty = convnet(), faulty

    def forward(self, x):
        x = self.inner[:3](x + torch.randn_like(x))
        return self.inner[3:](Faulty.apply(x) if self.faulty else x)


@pytest.mark.parametrize("measure", [lambda net, x: collect(net, [x], ekfac=True), lambda net, x: collect(net, [x], sharing="reduce"),
                                     lambda net, x: squared_gradients(net, [x])])
@pytest.mark.parametrize("faulty", [False, True])
def test_a_network_that_draws_or_raises_in_backward_is_left_as_it_was(measure, faulty):
    net, x = Drawing(faulty).train(), randn(4, 2, 8, 9)
    net.inner[0].weight.requires_grad_(False)
    before = snapshot(net)
    if faulty:
        with pytest.raises(ValueError, match="the user's own fault"):
            measure(net, x)
    else:
        measure(net, x)
    assert_untouched(net, before)


@pytest.mark.parametrize("label", [-100, 3, 7])
def test_labels_outside_the_classes_are_one_sentence(label):
    with pytest.raises(UserError) as error:
        collect(mlp(), [(randn(3, 4), torch.tensor([0, label, 1]))], fisher="empirical")
    assert f"A label is {label}, expected 0 to 2" in str(error.value) and "\n" not in str(error.value)
