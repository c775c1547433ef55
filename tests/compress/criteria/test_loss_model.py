"""Oracle: exact Gauss-Newton blocks of the squared error (tests/oracles), gradients by autograd, one module that runs twice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.criteria import CRITERIA
from compress.errors import UserError
from compress.graph import trace
from tests.compress.curvature.nets import randn
from tests.oracles.curvature import ggn_block

FISHER = dict.fromkeys(["kron_obd", "kron_obs", "c_obs", "obd", "obs", "c_obd"], "exact") | {"woodfisher": "empirical"}
X = randn(9, 2, 5, 5)


def regressor(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5, outputs)).double().eval()


def score(name, net, data, loss_fn=functional.mse_loss, **options):
    return CRITERIA[name].score(trace(net, X[:1]), net, data, loss_fn, torch.Generator().manual_seed(0), **options)


def test_squared_error_scores_are_the_exact_diagonal():
    net = regressor(2)
    diagonal = ggn_block(net, "0", X, "mse").diagonal().reshape(4, 19)[:, :18]
    expected = (net[0].weight.detach().flatten(1).square() * diagonal).sum(1) / 2
    ours = score("c_obd", net, [(X, randn(9, 2))], loss="mse", fisher="exact")["0.weight"]
    torch.testing.assert_close(ours, expected)


def test_woodfishers_blocks_of_the_squared_error_are_those_of_its_gradients():
    net, y = regressor(), randn(9, 1, seed=3)
    rows = [torch.autograd.grad((net(x[None]) - t).square().sum() / 2, net[2].weight)[0] for x, t in zip(X, y, strict=True)]
    products = torch.stack([(row * net[2].weight).flatten(1).sum(1) for row in rows]).detach()
    shift = 0.01 * torch.stack(rows).square().mean()
    expected = (shift * net[2].weight.detach().flatten(1).square().sum(1) + products.square().mean(0)) / 2
    torch.testing.assert_close(score("woodfisher", net, [(X, y)], loss="mse")["2.weight"], expected)


@pytest.mark.parametrize("name, fisher", FISHER.items())
def test_one_output_is_scored_under_the_squared_error_and_refused_under_cross_entropy(name, fisher):
    net, data = regressor(), [(X, randn(9, 1, seed=3))]
    assert all(values.max() > 0 for values in score(name, net, data, loss="mse", fisher=fisher).values())
    if fisher == "exact":
        with pytest.raises(UserError, match="one output per image, .*option `loss` to \"mse\""):
            score(name, net, data, functional.smooth_l1_loss)
    with pytest.raises(UserError, match="squared error.*set its option `loss` to \"mse\""):
        score(name, net, data)
    assert not net._forward_hooks


@pytest.mark.parametrize("loss_fn", [functional.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1),
                                     nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))])
@pytest.mark.parametrize("name", FISHER)
def test_every_kind_of_cross_entropy_is_served(name, loss_fn):
    data = [(X, torch.arange(9) % 3)]
    ours, plain = score(name, regressor(3), data, loss_fn), score(name, regressor(3), data, functional.cross_entropy)
    assert all(torch.equal(values, plain[group]) for group, values in ours.items())


def test_a_regressor_is_compressed_with_the_default_loss_function():
    small, _, report = compress(regressor(), X[:1], [(X, randn(9, 1))], method="kron_obs", budget={"params": 0.3}, options={"loss": "mse"},
                                recalibrate=False)
    assert report.widths["0"] and small(X).shape == (9, 1)


class Tied(nn.Module):
    """Two convolutions with one weight; `shared` runs one module twice instead."""

    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.b = self.a if shared else nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


DATA = [(X[:5], torch.tensor([0, 1, 2, 1, 0])), (X[5:], torch.tensor([2, 2, 0, 1]))]


@pytest.mark.parametrize("name", [*FISHER, "taylor", "taylor_2016"])
def test_layers_with_one_weight_are_refused(name):
    with pytest.raises(UserError, match="^Layers 'a' and 'b' share a parameter, and this criterion measures single layers; exclude them, "
                                        "or use the criterion 'taylor_fo' or 'hessian_trace'.$"):
        score(name, Tied(False), DATA, functional.cross_entropy)
    assert all(values.max() > 0 for values in score(name, Tied(True), DATA, functional.cross_entropy).values())


@pytest.mark.parametrize("name", ["kron_obs", "woodfisher"])
def test_a_shared_weight_is_not_updated_from_one_layers_inputs(name):
    net = Tied(False)
    before = copy.deepcopy(net.state_dict())
    group = next(group for group in trace(net, X[:1]).groups if any(m.parameter == "a.weight" and m.role == "in" for m in group.members))
    with pytest.raises(UserError, match="share a parameter"):
        CRITERIA[name].compensate(trace(net, X[:1]), net, {group.name: [1]}, DATA, **({"block": "layer"} if name == "woodfisher" else {}))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["taylor_fo", "hessian_trace", "l1"])
def test_criteria_of_weights_score_tied_like_shared_layers(name):
    tied, shared = (score(name, Tied(kind), DATA, functional.cross_entropy) for kind in (False, True))
    assert tied.keys() == shared.keys()
    for group, values in tied.items():
        torch.testing.assert_close(values, shared[group])
