"""Oracle: whether a path leads from the loss to a layer, by construction of the networks; the same layer with a path and zero gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.criteria import CRITERIA
from compress.criteria.second_order import SecondOrder
from compress.errors import UserError
from compress.graph import trace
from tests.compress.curvature.nets import randn

OPTIONS = {"taylor": {}, "taylor_2016": {}, "taylor_fo": {"slices": "producer"}, "hessian_trace": {}, "woodfisher": {}, "c_obd": {},
           "obd": {}, "kron_obs": {}, "c_obs": {}}
OUTSIDE = [name for name in OPTIONS if name not in ("taylor_fo", "hessian_trace")]  # these two follow the weight wherever it is used
DATA = [(randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])), (randn(3, 3, 8, 8, seed=1), torch.tensor([2, 0, 1]))]


class Net(nn.Module):
    """Two convolutions whose first one is run in the way that `how` names."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b, self.head = how, nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.double().eval()

    def forward(self, x):
        if self.how in ("no_grad", "nothing"):
            with torch.no_grad():
                x = self.a(x)
        elif self.how == "function":
            x = functional.conv2d(x, self.a.weight, self.a.bias)
        else:
            x = self.a(x)
        if self.how == "detach":
            x = x.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "nothing"):
            return self.head(torch.relu(self.b(torch.relu(x) * (0 if self.how == "dead" else 1))).mean((2, 3)))


def score(name, net, data=DATA, **options):
    return CRITERIA[name].score(trace(net, DATA[0][0][:1]), net, data, functional.cross_entropy, torch.Generator().manual_seed(0),
                                **OPTIONS[name], **options)


@pytest.mark.parametrize("name, how", [(name, how) for name in OPTIONS for how in ("no_grad", "detach", "function")
                                       if how != "function" or name in OUTSIDE])
def test_a_layer_without_gradients_is_named(name, how):
    with pytest.raises(UserError) as error:
        score(name, Net(how))
    if how == "function" and issubclass(CRITERIA[name], SecondOrder):
        assert str(error.value) == "Layer 'a' was named for statistics, but no calibration image reached it as a module; exclude it."
    else:
        assert str(error.value) == ("No gradient reached layer 'a' (it runs without gradients, outside its module, or its output is "
                                    "unused); exclude it.")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_network_without_any_gradient_is_the_same_fault(name):
    with pytest.raises(UserError, match="No gradient reached layer 'a' .*; exclude it."):
        score(name, Net("nothing"))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_zeros_are_values(name):
    with torch.no_grad():
        scores = score(name, Net("dead"), **({"images": 7} if name == "woodfisher" else {}))["a.weight"]
    # the damping alone is left
    assert (scores > 0).all() if name in ("woodfisher", "kron_obs", "c_obs") else (scores == 0).all()


@pytest.mark.parametrize("name", ["taylor_fo", "hessian_trace"])
def test_weights_used_outside_their_module_score_like_inside(name):
    inside, outside = score(name, Net("module")), score(name, Net("function"))
    for group, values in inside.items():
        torch.testing.assert_close(outside[group], values)
        assert values.abs().max() > 0


class Sometimes(Net):
    """Detaches the first layer in the smaller batch only."""

    def forward(self, x):
        self.how = "detach" if len(x) == 3 else "module"
        return super().forward(x)


@pytest.mark.parametrize("name", ["taylor", "taylor_2016", "taylor_fo", "hessian_trace"])
def test_one_batch_with_gradients_is_enough(name):
    some, one = (score(name, Sometimes("module"), data)["a.weight"] for data in (DATA, DATA[:1]))
    torch.testing.assert_close(some / some.sum(), one / one.sum())
    assert one.abs().max() > 0


class Pair(Net):
    """Returns its features beside the logits."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("name", OPTIONS)
def test_a_network_that_returns_a_tuple_is_one_sentence(name):
    with pytest.raises(UserError, match="^The network returned a tuple; wrap it so that it returns its logits as one tensor.$"):
        score(name, Pair("module"))


@pytest.mark.parametrize("name", ["taylor", "taylor_2016", "taylor_fo", "hessian_trace"])
def test_a_loss_function_that_reads_the_tuple_is_served(name):
    pair, net = Pair("module"), Net("module")
    ours = CRITERIA[name].score(trace(pair, DATA[0][0][:1]), pair, DATA, lambda out, y: functional.cross_entropy(out[0], y),
                                torch.Generator().manual_seed(0), **OPTIONS[name])
    assert all(torch.equal(values, ours[group]) for group, values in score(name, net).items())
