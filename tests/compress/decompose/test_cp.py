"""Oracle: tensorly's CP, planted tensors of known rank, and the error of the nested SVD from numpy's singular values."""

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress import compress
from compress.decompose import FactorizedConv2d, cp, recompose
from compress.decompose.unweighted import nested_svd
from compress.methods.low_rank import cp_bound
from tests.compress.decompose.nets import batches, network


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_bound(w, rank):
    """Squared error of the `rank` largest products of the nested SVD."""
    o, c = w.shape[:2]
    _, s, v = np.linalg.svd(w.double().reshape(o, -1).numpy(), full_matrices=False)
    energy = np.concatenate([(size * np.linalg.svd(row.reshape(c, -1), compute_uv=False)) ** 2 for size, row in zip(s, v, strict=True)])
    return np.sort(energy)[::-1][rank:].sum()


def squared_error(w, rank):
    return (recompose(cp(w, rank).map(lambda tensor: tensor.double())) - w).square().sum().item()


def one_entry():
    w = torch.zeros(8, 6, 3, 3)
    w[3, 2, 1, 0] = -2
    return w


def dead_filters():
    w = weight(12, 8, 3, 3).float()
    w[3:] = 0
    return w


DEGENERATE = {
    "dirac": nn.init.dirac_(torch.empty(12, 12, 3, 3)),
    "constant": torch.ones(8, 8, 3, 3),
    "one entry": one_entry(),
    "dead filters": dead_filters(),
    "equal filters": weight(1, 6, 3, 3).float().repeat(8, 1, 1, 1),
    "rank one": torch.einsum("o,c,k->ock", weight(9), weight(7, seed=1), weight(9, seed=2)).reshape(9, 7, 3, 3).float(),
    "nearly dirac": nn.init.dirac_(torch.empty(12, 12, 3, 3)) + 1e-6 * weight(12, 12, 3, 3).float(),
}


@pytest.mark.parametrize("rank", [1, 4, 12, 20, 40])
@pytest.mark.parametrize("case", list(DEGENERATE))
def test_a_degenerate_weight_is_never_worse_than_the_nested_svd(case, rank):
    w = DEGENERATE[case]
    factors = cp(w, rank)
    assert all(torch.isfinite(tensor).all() for tensor in factors.tensors.values())
    assert (factors.input.shape, factors.core.shape, factors.output.shape) == ((rank, w.shape[1]), (rank, 1, 3, 3), (w.shape[0], rank))
    assert squared_error(w, rank) <= numpy_bound(w, rank) * (1 + 1e-6) + 1e-12 * w.square().sum().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_error_of_a_dirac_weight_is_what_its_rank_leaves(dtype):
    w = DEGENERATE["dirac"].to(dtype)
    for rank in (1, 4, 12, 20):
        factors = cp(w, rank)
        assert all(tensor.dtype == dtype for tensor in factors.tensors.values())
        # twelve orthonormal products, of which any `rank` are as good
        assert squared_error(w, rank) == pytest.approx(max(12 - rank, 0), abs=0.05)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_cp_exceeds_its_bound(data):
    o, c, kh, kw = (data.draw(st.integers(1, n)) for n in (6, 6, 3, 3))
    rank = data.draw(st.integers(1, min(o * c, o * kh * kw, c * kh * kw)))
    # few different values make singular and equal slices likely
    values = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5]) if data.draw(st.booleans()) else st.floats(-2, 2, width=32)
    w = torch.tensor(data.draw(st.lists(values, min_size=o * c * kh * kw, max_size=o * c * kh * kw)), dtype=torch.float64).reshape(o, c, kh, kw)
    bound, energy = cp_bound(w), w.square().sum().item()
    assert bound[0].item() == pytest.approx(energy) and bound[-1] == 0 and (bound.diff() <= 0).all()
    assert bound[rank].item() == pytest.approx(numpy_bound(w, rank), abs=1e-10 * energy)
    assert squared_error(w, rank) <= bound[rank].item() + 1e-10 * energy


@pytest.mark.parametrize("shape", [(8, 6, 9), (2, 12, 9), (30, 2, 3), (4, 5, 1)])
def test_the_nested_svd_is_a_sum_of_orthonormal_products(shape):
    t = weight(*shape)
    sizes, left, right, kernel = nested_svd(t)
    o, c, m = shape
    assert len(sizes) >= min(o * c, o * m, c * m) and (sizes.diff() <= 0).all()
    products = torch.einsum("or,cr,mr->rocm", left, right, kernel).flatten(1)
    torch.testing.assert_close(products @ products.T, torch.eye(len(sizes), dtype=torch.float64))
    torch.testing.assert_close((sizes @ products).reshape(shape), t)
    for part, whole in zip(nested_svd(t, 3)[1:], (left, right, kernel), strict=True):
        assert torch.equal(part, whole[:, :3])


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("rank, ratio", [(2, 1.02), (4, 1.02), (10, 1.02), (20, 0.6)])
def test_cp_is_as_close_as_tensorly_from_its_own_start(rank, ratio):
    from tensorly.decomposition import parafac

    ours = theirs = 0.0
    for seed in range(6):
        w = weight(8, 6, 3, 3, seed=seed)
        found = parafac(w.reshape(8, 6, 9).numpy(), rank, n_iter_max=100, init="svd", tol=1e-9, random_state=0)
        theirs += np.square(tensorly.cp_to_tensor(found) - w.reshape(8, 6, 9).numpy()).sum()
        ours += squared_error(w, rank)
    assert ours <= ratio * theirs


def test_cp_recovers_a_planted_tensor():
    planted = torch.einsum("or,rkl,rc->ockl", weight(8, 3), weight(3, 3, 3, seed=1), weight(3, 7, seed=2))
    factors = cp(planted, 3, sweeps=500)
    assert factors.depthwise and factors.core.shape == (3, 1, 3, 3)
    assert (recompose(factors) - planted).norm() / planted.norm() < 1e-4


def test_cp_of_a_zero_weight_is_zero_and_leaves_numpy_random_state():
    state = np.random.get_state()[1].copy()
    assert recompose(cp(torch.zeros(4, 3, 3, 3), 2)).abs().max() == 0
    cp(weight(3, 3, 3, 3), 5)
    assert (np.random.get_state()[1] == state).all()


def dirac(net):
    nn.init.dirac_(net.b.weight)


def mostly_zero(net):
    with torch.no_grad():
        net.b.weight[3:] = 0
        net.b.weight[:, 2:] = 0
        net.b.weight[..., 1:] = 0


@pytest.mark.parametrize("method, options", [("cp", {}), ("eigendamage_depthwise", {}), ("improved_eigendamage", {"decomposition": "cp"})])
@pytest.mark.parametrize("prepare", [dirac, mostly_zero])
def test_a_network_with_a_degenerate_convolution_is_compressed(prepare, method, options):
    net, x = network(), torch.cat([x for x, _ in batches()])
    prepare(net)
    small, _, report = compress(net, x[:1], batches(), method=method, budget={"params": 0.4}, recalibrate=False, options=options)
    assert report.params_removed >= 0.39 and torch.isfinite(small(x)).all()
    assert any(isinstance(module, FactorizedConv2d) and module.depthwise for module in small.modules())
