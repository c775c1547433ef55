"""Oracle: numpy's singular values, tensorly's Tucker, and planted tensors of known rank."""

import numpy as np
import pytest
import tensorly
import torch

from compress.decompose import cp, orthonormalise, recompose, svd, tucker2
from compress.decompose.factors import Factors, merge_core
from compress.decompose.unweighted import hooi, matricise
from compress.errors import UserError


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["output", "input", "spatial"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_error_is_the_tail_of_the_singular_values(mode, rank):
    w = weight(6, 5, 3, 2)
    tail = np.linalg.svd(matricise(w, mode).numpy(), compute_uv=False)[rank:]
    error = (recompose(svd(w, rank, mode)) - w).square().sum().item()
    assert error == pytest.approx((tail**2).sum(), rel=1e-10)


def test_svd_of_a_matrix_and_its_dtype():
    w = weight(7, 4).float()
    factors = svd(w, 4)
    assert factors.input.dtype == torch.float32 and factors.ranks == (4, 4) and factors.core is None
    torch.testing.assert_close(recompose(factors), w, rtol=1e-5, atol=1e-6)


def test_tucker_equals_tensorly_in_error():
    from tensorly.decomposition import partial_tucker

    w = weight(8, 7, 3, 3, seed=1)
    ours = (recompose(tucker2(w, (4, 3), sweeps=200)) - w).norm().item()
    (core, (left, right)), _ = partial_tucker(w.numpy(), rank=[4, 3], modes=[0, 1], n_iter_max=500, tol=1e-14)
    theirs = np.linalg.norm(tensorly.tenalg.multi_mode_dot(core, [left, right], modes=[0, 1]) - w.numpy())
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_tucker_recovers_a_planted_rank():
    planted = torch.einsum("op,pqyx,qc->ocyx", weight(9, 2), weight(2, 3, 3, 3, seed=1), weight(3, 7, seed=2))
    factors = tucker2(planted, (2, 3))
    torch.testing.assert_close(recompose(factors), planted, rtol=0, atol=1e-12)
    assert factors.core.shape == (2, 3, 3, 3)
    assert (recompose(tucker2(planted, (2, 2))) - planted).norm() > 0.1


def test_tucker_of_a_rotated_weight_is_the_rotated_tucker():
    """The published Improved EigenDamage rotates first: its Tucker step ignores the curvature."""
    w = weight(8, 6, 3, 3)
    q_out, q_in = torch.linalg.qr(weight(8, 8, seed=1))[0], torch.linalg.qr(weight(6, 6, seed=2))[0]
    rotated = torch.einsum("ockl,op,cq->pqkl", w, q_out, q_in)
    back = torch.einsum("pqkl,op,cq->ockl", recompose(tucker2(rotated, (4, 3), sweeps=300)), q_out, q_in)
    torch.testing.assert_close(back, recompose(tucker2(w, (4, 3), sweeps=300)), rtol=0, atol=1e-5)


def test_hooi_energy_never_falls_below_its_start():
    t = weight(6, 5, 4)
    start = torch.linalg.qr(weight(5, 2, seed=3))[0]
    best_out = torch.linalg.svd(torch.einsum("ocm,cq->oqm", t, start).flatten(1))[0][:, :3]
    before = torch.einsum("ocm,op,cq->pqm", t, best_out, start).square().sum()
    after = torch.einsum("ocm,op,cq->pqm", t, *hooi(t, (3, 2), start)).square().sum()
    assert after >= before - 1e-12


@pytest.mark.parametrize("factors", [
    Factors(weight(3, 6), weight(4, 3, 3, 3, seed=1) * 50, weight(7, 4, seed=2) / 40),
    Factors(weight(3, 6), weight(4, 3, 3, 3, seed=1) * 50, None),
    Factors(None, weight(4, 3, 3, 3, seed=1) * 50, weight(7, 4, seed=2) / 40),
    Factors(weight(3, 6) * 1e3, None, weight(7, 3, seed=2)),
    Factors(weight(9, 6) * 1e3, None, weight(7, 9, seed=2)),
    Factors(weight(3, 6), weight(3, 1, 3, 3, seed=1) * 50, weight(7, 3, seed=2) / 40, depthwise=True),
    Factors(None, weight(3, 5, 3, 1, seed=1) * 50, weight(7, 3, 1, 3, seed=2) / 40),
    Factors(weight(4, 3), weight(6, 2, 3, 3, seed=1), weight(8, 3, seed=2), groups=2),
])
def test_orthonormalisation_keeps_the_product(factors):
    balanced = orthonormalise(factors)
    torch.testing.assert_close(recompose(balanced), recompose(factors), rtol=1e-10, atol=1e-10)
    assert {name: t.shape for name, t in balanced.tensors.items()} == {name: t.shape for name, t in factors.tensors.items()}
    if (
        factors.core is not None
        and factors.input is not None
        and factors.output is not None
        and not factors.depthwise
        and factors.groups == 1
    ):
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(balanced.output.T @ balanced.output, eye)
        torch.testing.assert_close(balanced.input @ balanced.input.T, eye[:3, :3])
    elif factors.groups == 1:
        norms = [t.norm().item() for t in balanced.tensors.values()]
        if len(norms) == 2 and factors.output is not None and factors.output.ndim == 2:
            assert norms[0] == pytest.approx(norms[1], rel=1e-9)


@pytest.mark.parametrize("ranks", [(4, 3), (3, 4)])
def test_merging_a_1x1_core_keeps_the_product_and_saves_parameters(ranks):
    factors = Factors(weight(ranks[1], 6), weight(*ranks, seed=1), weight(7, ranks[0], seed=2))
    merged = merge_core(factors)
    torch.testing.assert_close(recompose(merged), recompose(factors))
    assert merged.parameters == 3 * (6 + 7) < factors.parameters


@pytest.mark.parametrize("call, words", [
    (lambda: svd(weight(4, 3), 4), "from 1 to 3, got 4"),
    (lambda: svd(weight(4, 3), 0), "from 1 to 3, got 0"),
    (lambda: svd(weight(4, 3, 3, 3), 1, "middle"), "'middle'"),
    (lambda: tucker2(weight(4, 3), (5, 1)), "from 1 to 4"),
    (lambda: tucker2(weight(4, 3), (2, 1.5)), "1.5"),
    (lambda: cp(weight(4, 3), 2), "convolution weight"),
    (lambda: svd(weight(4, 3) * float("nan"), 1), "NaN"),
    (lambda: svd(torch.zeros(3, 0), 1), "(3, 0)"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
