"""Oracles: the conservation laws of synaptic flow, and a direct product of absolute matrices."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from compress.errors import RunError
from compress.saliency import score_weights
from compress.saliency.far_flow import FarFlow
from tests.compress.saliency.networks import Residual, chain, data


def scores_of(model, shape=(3, 8, 8), names=None):
    names = names or [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    return score_weights(model, names, "synflow", input_shape=shape)


def test_matrix_product():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    a, b = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    scores = scores_of(model, (3,))
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(scores["0.weight"], a * b.sum(0)[:, None] * one, rtol=1e-14, atol=0)
    torch.testing.assert_close(scores["2.weight"], b * (a @ one)[None, :], rtol=1e-14, atol=0)
    assert generator.initial_seed() == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [True, False])
def test_layer_conservation_in_chains(seed, bias):
    # Trained statistics, signs and biases included: every layer's scores sum to R.
    model = chain(torch.Generator().manual_seed(seed), bias=bias)
    sums = [float(score.sum()) for score in scores_of(model).values()]
    assert max(sums) / min(sums) - 1 < 1e-12 and min(sums) > 0


@pytest.mark.parametrize("seed", range(4))
def test_unit_conservation(seed):
    model = chain(torch.Generator().manual_seed(seed), bias=True)
    scores = list(scores_of(model).values())
    for below, above in pairwise(scores):
        into, out = below.flatten(1).sum(1), above.transpose(0, 1).flatten(1).sum(1)
        assert float(((into - out) / out).abs().max()) < 1e-12


def test_cut_conservation_in_residual_networks():
    # Branch plus skip carry R: R(full) = R(branch zeroed) + sum of the branch's scores.
    model = Residual().double()
    full = {name: float(score.sum()) for name, score in scores_of(model).items()}
    model.b.weight.data.zero_()
    skip = float(scores_of(model)["stem.weight"].sum())
    assert full["stem.weight"] == pytest.approx(full["head.weight"], rel=1e-12)
    assert skip + full["b.weight"] == pytest.approx(full["head.weight"], rel=1e-12)
    assert full["b.weight"] < 0.999 * full["head.weight"]


def test_scores_of_normalisation_scales():
    model = chain(torch.Generator().manual_seed(1))
    scores = scores_of(model, names=["0.weight", "1.weight"])
    torch.testing.assert_close(scores["1.weight"], scores["0.weight"].flatten(1).sum(1), rtol=1e-12, atol=0)


def test_independent_of_data_signs_and_unit_rescaling():
    generator = torch.Generator().manual_seed(2)
    model = chain(generator, norm=False, bias=True)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    first = scores_of(model)
    for _ in range(2):
        other = score_weights(model, names, "synflow", batches=data(generator))
        assert all(torch.equal(first[name], other[name]) for name in names)
    with torch.no_grad():
        factor = 2.0 ** torch.randint(-3, 4, (6,), generator=generator).double()
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        convs[0].weight.mul_(-factor[:, None, None, None])
        convs[0].bias.add_(3)
        convs[1].weight.div_(factor[None, :, None, None])
    rescaled = scores_of(model)
    for name in names:
        torch.testing.assert_close(first[name], rescaled[name], rtol=1e-13, atol=0)


def test_flow_beyond_float64_is_scaled_for_all_weights_alike():
    # 2^3000: every layer's score is the whole flow, whatever power of two stands for it.
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(10)]).double()
    for layer in model:
        layer.weight.data.fill_(2.0**300)
    assert len({float(score) for score in scores_of(model, (1,)).values()}) == 1
    # Below: the same network with small weights tells what the scores must be up to one factor.
    small, large = (chain(torch.Generator().manual_seed(3), bias=True) for _ in range(2))
    with torch.no_grad():
        for module in large.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(2.0**300)
    expected, found = scores_of(small), scores_of(large)
    factor = float(found["0.weight"].sum() / expected["0.weight"].sum())
    assert all(torch.equal(found[name], expected[name] * factor) for name in expected)


class Steps(nn.Module):
    """Residual blocks of very large gain: `(1 + g)` per block, with scales on the skip paths and parts put side by side."""

    def __init__(self, blocks: int, gain: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 2, 3, padding=1) for _ in range(2 * blocks))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)
        self.gain = gain

    def forward(self, x):
        x = self.stem(x).relu_()
        for a, b in zip(self.convs[::2], self.convs[1::2], strict=True):
            y = torch.cat([a(x) * self.gain, b(x)], 1)
            y += x * self.scale.view(-1, 1, 1)
            x = torch.nn.functional.max_pool2d(y, 2, 1, 1)[:, :, 1:, 1:]
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("biases", [False, True])
def test_far_flow_of_residual_networks(biases):
    """With 20 blocks the plain computation still stands; both agree. With 200 only the other one does, and the last layer gets all of R."""
    torch.manual_seed(0)
    model = Steps(20, 2.0**20).double()
    names = [name for name, parameter in model.named_parameters() if name != "scale" and (parameter.dim() > 1 or biases)]
    plain = scores_of(model, names=names)
    state = {name: value.detach().abs() for name, value in model.named_parameters()}
    chosen = {name: state[name].requires_grad_(True) for name in names}
    mode = FarFlow(biases=[chosen[name] for name in names if name.endswith("bias")])
    with mode:
        flow = torch.func.functional_call(model, state, (torch.ones(1, 3, 8, 8, dtype=torch.float64),)).sum()
    assert mode.exponent(flow) > 300
    far = torch.autograd.grad(flow, list(chosen.values()))
    for (name, weight), grad in zip(chosen.items(), far, strict=True):
        torch.testing.assert_close(grad * weight * 2.0 ** mode.exponent(flow), plain[name], rtol=1e-12, atol=0)
    deep = scores_of(Steps(200, 2.0**20).double(), names=["stem.weight", "head.weight", "convs.0.weight", "convs.399.weight"])
    assert deep["stem.weight"].sum() == pytest.approx(float(deep["head.weight"].sum()), rel=1e-9)
    assert all(bool((score >= 0).all() and score.sum() > 0) for score in deep.values())


def test_flow_that_no_number_holds_is_refused():
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    model[0].weight.data.fill_(1e308)
    with pytest.raises(RunError, match="range of float64"):
        scores_of(model, (4,))


@pytest.mark.parametrize("norm", [True, False])
def test_units_conserve_flow_with_biases(norm):
    """What enters a unit, its bias (or the shift of its normalisation) included, leaves it; biases only add to R."""
    model = chain(torch.Generator().manual_seed(4), bias=True, norm=norm)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 or name.endswith("bias")]
    found = scores_of(model, names=names)
    layers = [name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() > 1]
    modules = dict(model.named_modules())
    for below, above in pairwise(layers):
        own = found[f"{below}.bias"]
        if norm:  # the convolution's bias passes the normalisation, whose shift is added behind it
            own = own + found[f"{list(modules)[list(modules).index(below) + 1]}.bias"]
        into = found[f"{below}.weight"].flatten(1).sum(1) + own
        out = found[f"{above}.weight"].transpose(0, 1).flatten(1).sum(1)
        torch.testing.assert_close(into, out, rtol=1e-12, atol=0)
    whole = sum(float(score.sum()) for name, score in found.items() if name.endswith("bias")) + float(found[f"{layers[0]}.weight"].sum())
    last = float(found[f"{layers[-1]}.weight"].sum() + found[f"{layers[-1]}.bias"].sum())
    assert whole == pytest.approx(last, rel=1e-12)
    without = scores_of(model)
    assert float(without[f"{layers[0]}.weight"].sum()) == pytest.approx(float(found[f"{layers[0]}.weight"].sum()), rel=1e-12)


def test_other_norms_are_scales():
    # Layer, group and instance norm: the flow through them is |gamma| times what enters, so that layers still share one total.
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sums = [
        float(score.sum())
        for score in scores_of(model, names=["0.weight", "1.weight", "3.weight", "4.weight", "7.weight", "8.weight"]).values()
    ]
    assert max(sums) / min(sums) - 1 < 1e-12 and min(sums) > 0
