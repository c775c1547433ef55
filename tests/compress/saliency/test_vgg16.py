"""Oracles: published MAC fractions and counts of the study's VGG-16 (no BatchNorm, kaiming-normal), and the conservation laws on it."""

from itertools import pairwise

import pytest

from compress.effective import report
from compress.masks import Masks, prune
from compress.saliency import score_weights
from compress.siblings import own

SHAPE = (3, 32, 32)
OPTIONS = {"input_shape": SHAPE}


def network(name="vgg16_plain"):
    return own("models").build(name, 10, variant="average")


@pytest.mark.slow_ci
def test_conservation():
    model = network()
    names = Masks.attach(model).names
    scores = list(score_weights(model, names, "synflow", input_shape=SHAPE).values())
    sums = [float(score.sum()) for score in scores]
    assert max(sums) / min(sums) - 1 < 1e-12 and 1e21 < sums[0] < 1e24
    for below, above in pairwise(scores):
        into, out = below.flatten(1).sum(1), above.transpose(0, 1).flatten(1).sum(1)
        assert float(((into - out) / out).abs().max()) < 1e-12


@pytest.mark.slow_ci
@pytest.mark.parametrize("exponent,fraction", [(0.5, 0.6424), (1.0, 0.4572)])
def test_one_shot_mac_fractions(exponent, fraction):
    masks = Masks.attach(network())
    prune(masks, "synflow", 10**-exponent, iterations=1, options=OPTIONS)
    found = report(masks, SHAPE)
    assert found.macs == 313_201_664 and found.empty_layers == []
    assert found.macs_nonzero / found.macs == pytest.approx(fraction, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("density,least", [(0.1, 1700), (0.01, 1500)])
def test_hundred_iterations_leave_no_layer_empty(density, least):
    masks = Masks.attach(network())
    prune(masks, "synflow", density, options=OPTIONS)
    found = report(masks, SHAPE)
    assert min(layer.kept for layer in found.layers) > least
    assert found.kept == masks.kept == -(-round(density * masks.total, 6) // 1)


@pytest.mark.slow_ci
def test_one_shot_at_a_hundredth_empties_layers():
    masks = Masks.attach(network())
    prune(masks, "synflow", 0.01, iterations=1, options=OPTIONS, allow_empty=True)
    found = report(masks, SHAPE)
    assert {masks.names.index(name) for name in found.empty_layers} >= {8, 9, 10} and found.effective == 0
