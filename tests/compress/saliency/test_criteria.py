"""Oracles: closed formulas on a linear model, the Hessian of torch.autograd.functional, and finite side-effect snapshots."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from compress.errors import UserError
from compress.saliency import SALIENCY, score_weights
from tests.compress.saliency.networks import Residual, chain, data

NAMES = ["gradient_magnitude", "grasp", "magnitude", "negative", "positive", "random", "snip", "synflow", "threshold"]


def weights(model):
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def test_registry_holds_all():
    assert set(NAMES) <= set(SALIENCY.names())
    assert [name for name in NAMES if SALIENCY[name].needs_data] == ["gradient_magnitude", "grasp", "snip"]
    assert SALIENCY["synflow"].iterations == 100


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_no_side_effects(name, training):
    generator = torch.Generator().manual_seed(1)
    model = chain(generator).train(training)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    options = {"input_shape": (3, 8, 8)} if name == "synflow" else {"train_mode": True} if SALIENCY[name].needs_data else {}
    score_weights(model, weights(model), name, batches=data(generator), generator=torch.Generator().manual_seed(0), **options)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert [m.training for m in model.modules()] == modes
    assert not model[0].weight.requires_grad and torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if key != "0.weight")


@pytest.mark.parametrize("name", NAMES)
def test_same_call_same_scores(name):
    generator = torch.Generator().manual_seed(2)
    model, batches = chain(generator), data(generator)
    first, second = (
        score_weights(model, weights(model), name, batches=batches, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_magnitude_sign_threshold_values():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.5, -0.25, 0.0, -2.0]])
    inf = torch.inf
    expected = {"magnitude": [0.5, 0.25, 0.0, 2.0], "positive": [0.5, inf, inf, inf], "negative": [inf, 0.25, inf, 2.0]}
    for name, values in expected.items():
        assert score_weights(model, ["weight"], name)["weight"].tolist() == [values]
    assert score_weights(model, ["weight"], "threshold", threshold=0.5)["weight"].tolist() == [[0.5, 0.25, 0.0, inf]]


def test_gradients_match_closed_form():
    # L = mean over examples of 0.5 * (w x - y)^2, so dL/dw = mean((w x - y) x) over both batches together.
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(3, 1, bias=False).double()
    xs = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 2)]
    ys = [torch.randn(len(x), 1, generator=generator, dtype=torch.float64) for x in xs]
    x, y, w = torch.cat(xs), torch.cat(ys), model.weight.detach()
    grad = ((x @ w.T - y) * x).mean(0, keepdim=True)
    loss = lambda out, target: 0.5 * ((out - target) ** 2).mean()

    def run(name, **options):
        return score_weights(model, ["weight"], name, batches=list(zip(xs, ys)), loss_fn=loss, **options)["weight"]

    torch.testing.assert_close(run("gradient_magnitude"), grad.abs(), rtol=1e-12, atol=0)
    torch.testing.assert_close(run("snip"), (grad * w).abs(), rtol=1e-12, atol=0)
    hessian = x.T @ x / len(x)
    torch.testing.assert_close(run("grasp", temperature=1.0), w * (grad @ hessian), rtol=1e-11, atol=1e-15)


def test_grasp_matches_dense_hessian():
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(9, 4, generator=generator, dtype=torch.float64), torch.randint(3, (9,), generator=generator)
    names = ["0.weight", "2.weight"]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(vector):
        first, second = vector[:12].reshape(3, 4), vector[12:].reshape(3, 3)
        return nn.functional.cross_entropy(functional_call(model, {"0.weight": first, "2.weight": second}, (x,)) / 200, y)

    hessian = torch.autograd.functional.hessian(loss, flat)
    grad = torch.autograd.functional.jacobian(loss, flat)
    scores = score_weights(model, names, "grasp", batches=[(x[:4], y[:4]), (x[4:], y[4:])])
    found = torch.cat([scores[name].flatten() for name in names])
    torch.testing.assert_close(found, flat * (hessian @ grad), rtol=1e-9, atol=1e-18)


def test_signed_snip_is_conserved_over_layers():
    # Bias-free ReLU networks are homogeneous in each layer: sum(theta * g) = <dL/dz, z> for every layer.
    generator = torch.Generator().manual_seed(6)
    model, batches = chain(generator, norm=False), data(generator, batches=1)
    scores = score_weights(model, weights(model), "snip", batches=batches, signed=True)
    x, y = batches[0]
    z = model(x).detach().requires_grad_()
    grad = torch.autograd.grad(nn.functional.cross_entropy(z, y), z)[0]
    expected = float((grad * z.detach()).sum())
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(expected, rel=1e-10)


def test_user_errors():
    model = Residual()
    names = weights(model)
    with pytest.raises(UserError, match="did you mean 'magnitude'"):
        score_weights(model, names, "magnitud")
    with pytest.raises(UserError, match="has no option 'temprature'.*did you mean 'temperature'"):
        score_weights(model, names, "grasp", temprature=2.0)
    with pytest.raises(UserError, match="needs calibration data"):
        score_weights(model, names, "snip")
    with pytest.raises(UserError, match="no generator"):
        score_weights(model, names, "random")
    with pytest.raises(UserError, match="input_shape"):
        score_weights(model, names, "synflow")
    model.a.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not numbers for 'a.weight'"):
        score_weights(model, names, "magnitude")
