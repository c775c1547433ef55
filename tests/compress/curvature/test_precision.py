"""Oracle: the same rounded weights and images in float64."""

import copy

import pytest
import torch
from torch import nn

from compress.curvature import collect, squared_gradients
from compress.curvature.fisher import cotangents
from tests.compress.curvature.nets import convnet, mlp, randn

HALVES = [torch.bfloat16, torch.float16]


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fisher", ["empirical", "true", "exact"])
def test_cotangents_of_a_confident_network_keep_their_relative_precision(dtype, fisher):
    logits = (randn(64, 5) * 4).to(dtype)
    labels = logits.argmax(1)
    half, double = (
        list(cotangents(z, labels, fisher, "cross_entropy", 1, torch.Generator().manual_seed(0))) for z in (logits, logits.double())
    )
    # one rounding of the result
    for a, b in zip(half, double, strict=True):
        assert a.dtype == dtype
        if dtype == torch.bfloat16:
            assert ((a.double() - b).abs() <= 2**-8 * b.abs() + 1e-30).all()
        else:
            assert ((a.double() - b).abs() <= 2**-11 * b.abs() + 2**-25).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_of_half_types_are_those_of_float64_up_to_their_rounding(dtype):
    net, x, y = convnet(), randn(16, 2, 8, 9).to(dtype), torch.arange(16) % 3
    half = copy.deepcopy(net).to(dtype)
    double = copy.deepcopy(half).double()
    for options in ({"fisher": "exact"}, {"fisher": "empirical"}):
        found, expected = (collect(n, [(i, y)], ekfac=True, **options) for n, i in ((half, x), (double, x.double())))
        for name, entry in found.items():
            assert entry.A.dtype == entry.G.dtype == entry.second.dtype == torch.float64
            assert relative(entry.A, expected[name].A) < 0.02 and relative(entry.G, expected[name].G) < 0.03
            assert entry.second.sum().item() == pytest.approx(expected[name].second.sum().item(), rel=0.03)
        squares = squared_gradients(half, [(x, y)], **options)
        exact = squared_gradients(double, [(x.double(), y)], **options)
        assert all(relative(squares[name], exact[name]) < 0.05 for name in squares)


def test_empirical_factors_of_a_confident_bfloat16_classifier():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    layer.weight.data *= 6
    x = randn(64, 5).bfloat16()
    half = copy.deepcopy(layer).bfloat16()
    logits = half(x).detach()
    labels = logits.argmax(1)
    error = logits.double().softmax(1) - nn.functional.one_hot(labels, 4)
    found = collect(nn.Sequential(half), [(x, labels)], fisher="empirical")["0"].G
    assert relative(found, error.T @ error / 64) < 0.01


def test_tokens_in_half_precision_find_their_images():
    net, x = mlp(), randn(4, 8, 4)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x):
            return self.net(x.transpose(0, 1).flatten(0, 1)).view(8, len(x), 3).mean(0)

    found = squared_gradients(Flat().bfloat16(), [x.bfloat16()], fisher="exact")
    expected = squared_gradients(Flat().bfloat16().double(), [x.bfloat16().double()], fisher="exact")
    assert all(relative(found[name], expected[name]) < 0.05 for name in expected)
