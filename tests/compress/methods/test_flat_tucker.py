"""Oracle: torch.linalg.svd of the (whitened) matrix, and counts of the materialised network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress, load, save
from compress.cost import count
from compress.decompose.modules import dense_weight
from compress.graph import trace
from compress.methods import Context, method

X = torch.randn(40, 12, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [(X, torch.arange(40) % 4)]
NAMES = ["tucker", "kfac_tucker"]


@pytest.fixture(scope="module")
def model():
    """Two 1x1 convolutions, one strided, and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(12, 20, 1, stride=2), nn.ReLU(), nn.Conv2d(20, 16, 1, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)).double().eval()


def prepared(name, model, **settings):
    context = Context(model, trace(model, X[:1]), X[:1], BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), **settings)
    return method(name).prepare(context)


def truncated(w, rank):
    u, s, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(w.shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_two_factors_of_one_rank_meet_the_budget(model, name, quantity):
    small, _, report = compress(model, X[:1], BATCHES, method=name, budget={quantity: 0.4}, recalibrate=False)
    removed = 1 - getattr(count(small, X[:1]), quantity) / getattr(count(model, X[:1]), quantity)
    assert report.ranks and all(len(list(small.get_submodule(layer).children())) == 2 for layer in report.ranks)
    assert 0.39 <= removed <= 0.45


def test_tucker_of_a_matrix_is_its_truncated_svd_at_the_loss_of_the_menu(model):
    small, _, report = compress(model, X[:1], method="tucker", budget={"params": 0.4}, recalibrate=False)
    losses = {menu.name: dict(zip(menu.ranks, menu.losses)) for menu in prepared("tucker", model).estimated}
    for layer, (_, ranks) in report.ranks.items():
        w, found = model.get_submodule(layer).weight.detach(), dense_weight(small.get_submodule(layer))
        torch.testing.assert_close(found, truncated(w, ranks[0]), rtol=1e-9, atol=1e-10)
        assert losses[layer][ranks[0], ranks[0]] == pytest.approx(float((found - w).square().sum() / w.square().sum()), rel=1e-8)


def test_both_methods_of_the_curvature_choose_the_same_weights(model):
    one, two = (compress(model, X[:1], BATCHES, method=name, budget={"macs": 0.4}, recalibrate=False)[0] for name in ("kfac_tucker", "kfac_svd"))
    for layer in ("0", "2", "6", "8"):
        torch.testing.assert_close(dense_weight(one.get_submodule(layer)), dense_weight(two.get_submodule(layer)), rtol=1e-6, atol=1e-8)


def test_both_factors_have_one_scale_and_the_stored_network_is_rebuilt(model, tmp_path):
    small, plan, report = compress(model, X[:1], method="tucker", budget={"params": 0.4}, recalibrate=False)
    for layer in report.ranks:
        first, second = (child.weight.norm() for child in small.get_submodule(layer).children())
        torch.testing.assert_close(first, second)
    save(small, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, copy.deepcopy(model))(X), small(X))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_factorized_further(model, name):
    once = compress(model, X[:1], BATCHES, method=name, budget={"params": 0.3}, recalibrate=False)[0]
    twice, _, report = compress(once, X[:1], BATCHES, method=name, budget={"params": 0.3}, recalibrate=False)
    assert 0.29 <= report.params_removed <= 0.4 and torch.isfinite(twice(X)).all()
