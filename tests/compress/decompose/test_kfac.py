"""Oracle: the quadratic 1/2 tr(G D A D^T) evaluated directly, gradient descent on it, and every coordinate subset of the eigenbasis."""

import itertools

import pytest
import torch

from compress.curvature.quadratic import channel_moment, nearest_kronecker, patch_moment, predicted_loss, spatial_moment
from compress.decompose import eigendamage, kfac_svd, kfac_tucker2, recompose, svd, tucker2
from compress.decompose.eigen import bases, importance, keep_coordinates
from compress.decompose.kfac import whitened_spectrum
from compress.errors import RunError, UserError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, condition=30.0):
    q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    return (q * torch.logspace(0, torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)) @ q.T


def loss(factors, w, A, G):
    return predicted_loss(recompose(factors) - w, A, G).item()


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 2)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_loss_is_half_the_tail(shape, rank):
    w, A, G = randn(*shape), moment(randn(*shape)[0].numel(), 1), moment(6, 2)
    spectrum = whitened_spectrum(w, A, G, damping=0.0)
    assert loss(kfac_svd(w, A, G, rank, damping=0.0), w, A, G) == pytest.approx(
        spectrum[rank:].square().sum().item() / 2, rel=1e-9, abs=1e-12
    )


def test_svd_is_no_worse_than_descent_from_many_starts():
    w, A, G = randn(6, 5), moment(5, 1), moment(6, 2)
    best = loss(kfac_svd(w, A, G, 2, damping=0.0), w, A, G)
    found = []
    for seed in range(5):
        left, right = (t.requires_grad_() for t in (randn(6, 2, seed=seed + 5), randn(2, 5, seed=seed + 50)))
        optimiser = torch.optim.LBFGS([left, right], max_iter=300, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = predicted_loss(left @ right - w, A, G)
            value.backward()
            return value

        optimiser.step(closure)
        found.append(closure().item())
    assert best <= min(found) * (1 + 1e-9)
    assert min(found) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_whitened_tucker_is_never_worse_than_eigendamage_or_plain_tucker(seed):
    w, A, G = randn(6, 5, 3, 3, seed=seed), moment(5, seed + 1, 100.0), moment(6, seed + 2, 100.0)
    for ranks in ((3, 3), (2, 4), (5, 1)):
        ours = loss(kfac_tucker2(w, A, G, ranks, damping=0.0), w, A, G)
        assert ours <= loss(eigendamage(w, A, G, ranks), w, A, G) * (1 + 1e-9)
        assert ours <= loss(tucker2(w, ranks), w, A, G) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_refit_lowers_the_loss_under_the_full_patch_moment(seed):
    w, A, G = randn(6, 5, 3, 3, seed=seed), moment(45, seed + 1), moment(6, seed + 2)
    for ranks in ((3, 3), (2, 4)):
        refitted = loss(kfac_tucker2(w, A, G, ranks, damping=0.0), w, A, G)
        assert refitted <= loss(kfac_tucker2(w, A, G, ranks, refit=False, damping=0.0), w, A, G)
    full = [loss(kfac_tucker2(w, A, G, (r, 5), damping=0.0), w, A, G) for r in range(1, 7)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(full)) and full[-1] < 1e-9
    exact = whitened_spectrum(w, A, G, damping=0.0).square()
    assert full[2] == pytest.approx(exact[3:].sum().item() / 2, rel=1e-9)  # every input channel kept: the output SVD is the optimum


def test_identity_moments_give_the_ordinary_decompositions():
    w = randn(6, 5, 3, 3)
    eye, ident = torch.eye(45, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(recompose(kfac_svd(w, eye, ident, 3)), recompose(svd(w, 3)))
    weighted, plain = recompose(kfac_tucker2(w, eye, ident, (3, 3), sweeps=400)), recompose(tucker2(w, (3, 3), sweeps=400))
    assert (weighted - w).norm().item() == pytest.approx((plain - w).norm().item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["input", "spatial"])
def test_other_cuts_beat_the_unweighted_ones_in_the_channel_metric(mode):
    w, C, G = randn(6, 5, 3, 3), moment(5, 1, 100.0), moment(6, 2, 100.0)
    assert loss(kfac_svd(w, C, G, 4, mode, damping=0.0), w, C, G) < loss(svd(w, 4, mode), w, C, G)


def test_a_change_of_basis_leaves_the_loss_and_scales_square_it():
    w, A, G = randn(6, 5), moment(5, 1), moment(6, 2)
    p, q = torch.linalg.qr(randn(6, 6, seed=3))[0], torch.linalg.qr(randn(5, 5, seed=4))[0]
    base = loss(kfac_svd(w, A, G, 2), w, A, G)
    turned = loss(kfac_svd(p @ w @ q.T, q @ A @ q.T, p @ G @ p.T, 2), p @ w @ q.T, q @ A @ q.T, p @ G @ p.T)
    assert turned == pytest.approx(base, rel=1e-8)
    assert loss(kfac_svd(3 * w, A, G, 2), 3 * w, A, G) == pytest.approx(9 * base, rel=1e-9)


def test_a_dead_input_channel_costs_nothing():
    w, A, G = randn(6, 5), moment(5, 1), moment(6, 2)
    A[2], A[:, 2] = 0, 0
    assert loss(kfac_svd(w, A, G, 4, damping=0.0), w, A, G) < 1e-12
    assert loss(eigendamage(w, A, G, (6, 4)), w, A, G) < 1e-12


def test_moments_of_one_full_moment_agree():
    w, C, K = randn(6, 5, 3, 3), moment(5, 1), moment(9, 2)
    K = K * 9 / K.trace()
    A = torch.kron(C, K)
    torch.testing.assert_close(channel_moment(A, w), C)
    torch.testing.assert_close(spatial_moment(A, w), K)
    torch.testing.assert_close(torch.kron(*nearest_kronecker(A, w)), A)
    torch.testing.assert_close(torch.kron(*nearest_kronecker(A, w)), patch_moment(torch.nn.functional.pad(A, (0, 1, 0, 1)), w))
    D = randn(6, 5, 3, 3, seed=7)
    torch.testing.assert_close(predicted_loss(D, C, moment(6, 3)), predicted_loss(D, patch_moment(C, w), moment(6, 3)))


def test_nearest_kronecker_is_nearer_than_the_partial_traces():
    w, A = randn(6, 5, 3, 3), moment(45, 1)
    near = torch.kron(*nearest_kronecker(A, w))
    traces = torch.kron(channel_moment(A, w), spatial_moment(A, w))
    assert (near - A).norm() <= (traces - A).norm()
    # the rank-one singular value of the rearrangement is the best possible inner product
    rearranged = A.reshape(5, 9, 5, 9).permute(0, 2, 1, 3).reshape(25, 81)
    best = A.square().sum() - torch.linalg.svdvals(rearranged)[0] ** 2
    assert (near - A).square().sum().item() == pytest.approx(best.item(), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_the_published_sign_of_the_nearest_product_is_the_sign_of_its_trace(seed):
    """Published: the sign with which the entries of C add up to a positive number. Both factors are semidefinite, so it is the same sign."""
    rows = randn(60 if seed % 2 else 3, 20, seed=seed) - (seed % 3)
    A = rows.T @ rows / len(rows)
    u, s, v = torch.linalg.svd(A.reshape(5, 4, 5, 4).permute(0, 2, 1, 3).reshape(25, 16))
    C, K = s[0] * u[:, 0].reshape(5, 5), v[0].reshape(4, 4)
    sign = C.sum().sign()
    ours = nearest_kronecker(A, randn(6, 5, 2, 2))
    torch.testing.assert_close(torch.kron(*ours), torch.kron((sign * C).contiguous(), (sign * K).contiguous()))
    torch.testing.assert_close(ours[1], sign * K * 4 / (sign * K).trace())
    assert all(torch.linalg.eigvalsh(factor).min() >= -1e-9 * factor.trace() for factor in ours)


def test_eigendamage_rows_are_the_best_coordinate_subset():
    w, A, G = randn(5, 4, 2, 2), moment(4, 1, 100.0), moment(5, 2, 100.0)
    spectra = bases(w, A, G)
    every = torch.arange(4)
    losses = [
        loss(keep_coordinates(w, *(s.vectors for s in spectra), torch.tensor(rows), every), w, A, G)
        for rows in itertools.combinations(range(5), 3)
    ]
    assert loss(eigendamage(w, A, G, (3, 4)), w, A, G) == pytest.approx(min(losses), rel=1e-9)


def test_importances_add_up_to_twice_the_loss_of_dropping_everything():
    w, A, G = randn(5, 4, 2, 2), moment(4, 1), moment(5, 2)
    rows, columns = importance(w, *bases(w, A, G))
    assert rows.sum().item() == pytest.approx(2 * predicted_loss(w, A, G).item())
    assert columns.sum().item() == pytest.approx(rows.sum().item())
    spectra = bases(w, A, G)
    second = (spectra[1].values[:, None] * spectra[0].values)[..., None].expand(5, 4, 4)
    torch.testing.assert_close(importance(w, *spectra, second)[0], rows)


def test_zero_moments_give_finite_factors_and_nan_is_refused():
    w, zero, G = randn(6, 5), torch.zeros(5, 5), moment(6, 2)
    for factors in (kfac_svd(w, zero, G, 2), kfac_tucker2(w, zero, G, (2, 2)), eigendamage(w, zero, G, (2, 2))):
        assert all(torch.isfinite(t).all() for t in factors.tensors.values())
    with pytest.raises(RunError, match="NaN or infinity"):
        kfac_svd(w, zero * float("nan"), G, 2)
    with pytest.raises(UserError, match=r"\(7, 7\)"):
        kfac_svd(w, torch.eye(7), G, 2)
