"""Oracle: torch.linalg.svd and tensorly on the weights, convolutions by explicit windows, the quadratic as one dense product, enumeration."""

import itertools

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import nn
from torch.nn import functional

from compress import compress
from compress.decompose import kfac_svd, kfac_tucker2, recompose, svd, tucker2
from compress.decompose.kfac import DAMPING
from compress.decompose.modules import dense_weight, layer_cost
from compress.graph import trace
from compress.methods import Context, method
from compress.methods.menus import choose

X = torch.randn(48, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [(X, torch.arange(48) % 4)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(10, 12, (3, 2), padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).double().eval()


def prepared(name, model):
    context = Context(model, trace(model, X[:1]), X[:1], BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0))
    return method(name).prepare(context)


def by_windows(x, layer, weight):
    """The convolution of `layer` with another weight, one window after another."""
    x = functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    (kh, kw), (down, right) = layer.kernel_size, layer.stride
    rows = [[torch.einsum("nckl,ockl->no", x[:, :, i:i + kh, j:j + kw], weight) for j in range(0, x.shape[3] - kw + 1, right)]
            for i in range(0, x.shape[2] - kh + 1, down)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2) + layer.bias[:, None, None]


def truncated(w, rank):
    u, s, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(w.shape)


def test_svd_blocks_are_convolutions_with_the_truncated_weight(network):
    small, _, report = compress(network, X[:1], method="svd", budget={"params": 0.3}, recalibrate=False)
    convolutions = [name for name in report.ranks if isinstance(network.get_submodule(name), nn.Conv2d)]
    assert convolutions
    for name in convolutions:
        layer, block = network.get_submodule(name), small.get_submodule(name)
        x = torch.randn(2, layer.in_channels, 7, 7, dtype=torch.float64)
        expected = by_windows(x, layer, truncated(layer.weight.detach(), report.ranks[name][1][0]))
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def tucker_error(w, ranks):
    (core, factors), _ = partial_tucker(w.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=300, tol=1e-12)
    return np.linalg.norm(tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]) - w.numpy())


def cp_error(w, rank):
    found = parafac(w.flatten(2).numpy(), rank, n_iter_max=100, init="svd", tol=1e-9, random_state=1)
    return np.linalg.norm(tensorly.cp_to_tensor(found) - w.flatten(2).numpy())


# alternating least squares for CP ends in different places from different draws; Tucker's end is one
@pytest.mark.parametrize(("name", "reference", "slack"), [("tucker", tucker_error, 1e-6), ("cp", lambda w, ranks: cp_error(w, ranks[0]), 0.05)])
def test_tucker_and_cp_blocks_are_as_near_as_tensorlys(network, name, reference, slack):
    small, _, report = compress(network, X[:1], method=name, budget={"params": 0.4}, recalibrate=False)
    convolutions = [layer for layer in report.ranks if isinstance(network.get_submodule(layer), nn.Conv2d)]
    assert convolutions
    for layer in convolutions:
        w = network.get_submodule(layer).weight.detach()
        error = (dense_weight(small.get_submodule(layer)) - w).norm().item()
        assert 0 < error <= reference(w, report.ranks[layer][1]) * (1 + slack)


def quadratic(change, A, G):
    """1/2 vec(D)^T (G kron A) vec(D) with the dense matrix, D flattened row by row; A and G damped as the decomposition damps them."""
    A, G = (m + DAMPING * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in (A, G))
    d = change.reshape(-1)
    return 0.5 * float(d @ torch.kron(G.contiguous(), A.contiguous()) @ d)


def test_kfac_svd_costs_what_the_menu_says_and_no_more_than_any_other_weight_of_its_rank(network):
    menus, moments = (state := prepared("kfac_svd", network)).estimated, state.moments
    generator = torch.Generator().manual_seed(5)
    for menu in menus:
        w, entry = network.get_submodule(menu.name).weight.detach(), moments[menu.name]
        for (ranks, loss) in list(zip(menu.ranks, menu.losses))[1::2]:
            found = recompose(kfac_svd(w, entry.A, entry.G, ranks[0]))
            cost = quadratic(found - w, entry.A, entry.G)
            assert loss == pytest.approx(entry.scale() * cost, rel=1e-6, abs=1e-12)
            assert torch.linalg.matrix_rank(found.flatten(1)) <= ranks[0]
            assert cost <= quadratic(recompose(svd(w, ranks[0])) - w, entry.A, entry.G) * (1 + 1e-9)
            for _ in range(5):
                left = torch.randn(len(w), ranks[0], generator=generator, dtype=w.dtype)
                # a random output space with the best weight in it, and a small step away from the optimum
                inside = left @ torch.linalg.pinv(left) @ w.flatten(1)
                assert cost <= quadratic(inside.reshape(w.shape) - w, entry.A, entry.G)
                u, s, v = torch.linalg.svd(found.flatten(1) + 0.01 * torch.randn(len(w), w[0].numel(), generator=generator, dtype=w.dtype), full_matrices=False)
                near = ((u[:, :ranks[0]] * s[:ranks[0]]) @ v[:ranks[0]]).reshape(w.shape)
                assert cost <= quadratic(near - w, entry.A, entry.G) * (1 + 1e-9)


def test_kfac_tucker_costs_no_more_than_plain_tucker_or_random_bases_of_its_ranks(network):
    menus, moments = (state := prepared("kfac_tucker", network)).estimated, state.moments
    generator = torch.Generator().manual_seed(6)
    for menu in menus:
        w, entry = network.get_submodule(menu.name).weight.detach(), moments[menu.name]
        dense = w if w.ndim == 4 else w[..., None, None]
        for ranks in menu.ranks[1::7]:
            cost = quadratic(recompose(kfac_tucker2(w, entry.A, entry.G, ranks)) - w, entry.A, entry.G)
            assert cost <= quadratic(recompose(tucker2(w, ranks)) - w, entry.A, entry.G) * (1 + 1e-9)
            for _ in range(5):
                left, right = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=w.dtype))[0] for n, r in zip(w.shape[:2], ranks))
                other = torch.einsum("ockl,op,cq,rp,sq->rskl", dense, left, right, left, right).reshape(w.shape)
                assert cost <= quadratic(other - w, entry.A, entry.G)


def test_the_estimate_for_kfac_tucker_bounds_its_cost_under_the_channel_moment(network):
    menus, moments = (state := prepared("kfac_tucker", network)).estimated, state.moments
    for menu in menus:
        w, entry = network.get_submodule(menu.name).weight.detach(), moments[menu.name]
        offsets = w[0, 0].numel()
        blocks = entry.A.reshape(w.shape[1], offsets, w.shape[1], offsets)
        channel = sum(blocks[:, k, :, k] for k in range(offsets)) / offsets
        A = torch.kron(channel.contiguous(), torch.eye(offsets, dtype=w.dtype))
        for ranks, loss in list(zip(menu.ranks, menu.losses))[1::7]:
            cost = quadratic(recompose(kfac_tucker2(w, entry.A, entry.G, ranks, refit=False)) - w, A, entry.G)
            assert entry.scale() * cost <= loss * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("name", ["svd", "kfac_svd", "tucker"])
@pytest.mark.parametrize("quantity", [0, 1])
def test_the_allocation_is_the_best_of_all_combinations(network, name, quantity):
    menus = prepared(name, network).estimated
    # every tenth option of each layer, so that all combinations can be tried
    menus = [type(menu)(menu.name, *(part[:1] + part[1:][::max(1, len(menu.ranks) // 10)] for part in (menu.ranks, menu.losses, menu.costs))) for menu in menus]
    assert all(menu.costs[0] == layer_cost(network.get_submodule(menu.name), shape) for menu, shape in
               zip(menus, ((3, 7, 7), (8, 7, 7), (10, 4, 4), (12,))))
    every = list(itertools.product(*(range(len(menu.ranks)) for menu in menus)))
    costs = np.array([sum(menu.costs[i][quantity] for menu, i in zip(menus, pick)) for pick in every])
    losses = np.array([sum(menu.losses[i] for menu, i in zip(menus, pick)) for pick in every])
    for share in (0.9, 0.7, 0.5, 0.35):
        limit = share * costs[every.index((0,) * len(menus))]
        chosen = choose(menus, quantity, limit)
        assert sum(menu.costs[i][quantity] for menu, i in zip(menus, chosen)) <= limit
        assert sum(menu.losses[i] for menu, i in zip(menus, chosen)) <= losses[costs <= limit].min() * (1 + 2e-4) + 1e-12
