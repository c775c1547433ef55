"""Oracles: the conservation laws of synaptic flow, and a direct product of absolute matrices."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from compress.errors import RunError
from compress.saliency import score_weights
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


def test_flow_beyond_float64_is_rescaled_or_refused():
    # 2^1030 overflows; scaled by 2^-512 twice it does not. The scores of two equal paths stay equal.
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(10)]).double()
    for layer in model:
        layer.weight.data.fill_(2.0**103)
    assert {float(score) for score in scores_of(model, (1,)).values()} == {2.0**6}
    for layer in model:
        layer.weight.data.fill_(2.0**300)
    with pytest.raises(RunError, match="range of float64"):
        scores_of(model, (1,))


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
