"""Oracle: the quadratic 1/2 tr(G D A D^T) evaluated directly, weighted least squares by `lstsq`, descent on all three factors at once."""

import pytest
import torch

from compress.curvature.quadratic import predicted_loss
from compress.decompose import cp, factorize, kfac_cp, recompose
from compress.decompose.factors import Factors
from compress.decompose.kfac_cp import nested_losses, products
from compress.decompose.unweighted import nested_svd
from compress.errors import RunError, UserError

from .test_kfac import loss, moment, randn

W = randn(6, 5, 3, 3)


def whitened_least_squares(w, basis, A, G):
    """Output vectors by `lstsq` on G^(1/2) (W - L B^T) A^(1/2), all entries stacked: no use of G dropping out."""
    root_a, root_g = (torch.linalg.cholesky(m) for m in (A, G))
    design = torch.kron(root_g.T.contiguous(), (root_a.T @ basis).contiguous())
    target = (root_g.T @ w.flatten(1) @ root_a).flatten()
    return torch.linalg.lstsq(design, target[:, None]).solution.reshape(len(w), -1)


@pytest.mark.parametrize("seed", range(3))
def test_output_vectors_are_the_weighted_least_squares(seed):
    A, G = moment(45, seed + 1), moment(6, seed + 2)
    ours = kfac_cp(W, A, G, 7, iterations=0, damping=0.0)
    basis = products(ours.input.T, ours.core.flatten(1).T)
    torch.testing.assert_close(ours.output, whitened_least_squares(W, basis, A, G), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_every_nested_loss_is_that_of_its_own_least_squares(seed):
    A, G = moment(45, seed + 1), moment(6, seed + 2)
    found = nested_losses(W, A, G, damping=0.0)
    _, _, right, kernel = nested_svd(W.flatten(2), 30)
    assert found[0].item() == pytest.approx(predicted_loss(W, A, G).item(), rel=1e-9)
    for rank in (1, 2, 7, 15, 30):
        basis = products(right[:, :rank], kernel[:, :rank])
        left = whitened_least_squares(W, basis, A, G)
        assert found[rank].item() == pytest.approx(predicted_loss((left @ basis.T).reshape(W.shape) - W, A, G).item(), rel=1e-5, abs=1e-6 * found[0].item())
    assert bool((found.diff() <= 1e-12).all())
    assert len(nested_losses(W, A, G, largest=4)) == 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("over", [5, 45, 46])
def test_never_above_plain_cp_nor_above_the_estimate_and_more_iterations_never_hurt(seed, over):
    w, A, G = randn(6, 5, 3, 3, seed=seed), moment(over, seed + 1, 100.0), moment(6, seed + 2, 100.0)
    for rank in (2, 6, 12):
        refitted, few, many = (loss(kfac_cp(w, A, G, rank, iterations=n, damping=0.0), w, A, G) for n in (0, 5, 80))
        plain = loss(cp(w, rank), w, A, G)
        assert many <= few * (1 + 1e-9) <= refitted * (1 + 1e-8) <= plain * (1 + 1e-7)
        assert refitted <= nested_losses(w, A, G, damping=0.0)[rank].item() * (1 + 1e-7)
        assert many < 0.9 * plain


def test_as_low_as_descent_on_all_three_factors_from_the_same_place():
    A, G = moment(45, 1), moment(6, 2)
    ours = loss(kfac_cp(W, A, G, 4, iterations=2000, damping=0.0), W, A, G)
    start = cp(W, 4)
    parts = [t.clone().requires_grad_() for t in (start.input, start.core, start.output)]
    optimiser = torch.optim.LBFGS(parts, max_iter=5000, max_eval=10**4, history_size=50, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        value = predicted_loss(recompose(Factors(*parts, depthwise=True)) - W, A, G)
        value.backward()
        return value

    optimiser.step(closure)
    assert ours == pytest.approx(closure().item(), rel=0.02)  # both are at a local minimum, reached by different ways


def test_a_planted_cp_is_found_and_identity_moments_minimise_the_plain_error():
    planted = recompose(Factors(randn(3, 5), randn(3, 1, 3, 3, seed=1), randn(6, 3, seed=2), depthwise=True))
    A, G = moment(45, 1), moment(6, 2)
    assert loss(kfac_cp(planted, A, G, 3, iterations=200), planted, A, G) < 1e-8 * predicted_loss(planted, A, G)
    eye = torch.eye(45, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    assert (recompose(kfac_cp(W, *eye, 6)) - W).norm() <= (recompose(cp(W, 6)) - W).norm() * (1 + 1e-9)


def test_type_of_the_weight_balanced_components_and_the_weight_untouched():
    w, A, G = W.float(), moment(46, 1), moment(6, 2)
    before = w.clone()
    factors = kfac_cp(w, A, G, 5)
    assert torch.equal(w, before) and {t.dtype for t in factors.tensors.values()} == {torch.float32}
    norms = [factors.input.norm(dim=1), factors.core.flatten(1).norm(dim=1), factors.output.norm(dim=0)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-4, atol=1e-5)


def test_the_block_of_factorize_computes_with_the_product():
    torch.manual_seed(0)
    conv, A, G = torch.nn.Conv2d(5, 6, 3, stride=2, padding=1), moment(46, 1), moment(6, 2)
    block = factorize(conv, "kfac_cp", 3, A=A, G=G, iterations=10)
    x = torch.randn(2, 5, 8, 8)
    expected = torch.nn.functional.conv2d(x, recompose(kfac_cp(conv.weight, A, G, 3, iterations=10)), conv.bias, 2, 1)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    grouped = torch.nn.Conv2d(10, 12, 3, groups=2)
    assert factorize(grouped, "kfac_cp", 2, A=A[None, :45, :45].repeat(2, 1, 1), G=G[None].repeat(2, 1, 1)).groups == 2


def test_inference_mode_changes_nothing():
    A, G = moment(45, 1), moment(6, 2)
    with torch.inference_mode():
        inside = kfac_cp(W * 1, A * 1, G * 1, 5)
    torch.testing.assert_close(recompose(inside), recompose(kfac_cp(W, A, G, 5)))


def test_degenerate_and_bad_input():
    A, G = moment(45, 1), moment(6, 2)
    assert not recompose(kfac_cp(torch.zeros(6, 5, 3, 3), A, G, 3)).any()
    one = W.clone()
    one[1:] = 0  # a single output channel
    for a, g in ((A, G), (torch.zeros(45, 45), G), (A, torch.zeros(6, 6)), (torch.zeros(5, 5), torch.zeros(6, 6))):
        for w in (W, one):
            assert all(torch.isfinite(t).all() for t in kfac_cp(w, a, g, 28).tensors.values())
    for fault, said in ((lambda: kfac_cp(W[..., 0, 0], A, G, 2), "convolution weight"), (lambda: kfac_cp(W, A, G, 31), "from 1 to 30"),
                        (lambda: kfac_cp(W, torch.eye(7), G, 2), "does not belong"), (lambda: kfac_cp(W, A, G, 2, damping=-1.0), "damping"),
                        (lambda: kfac_cp(W, A, G, 2, iterations=-1), "iterations")):
        with pytest.raises(UserError, match=said):
            fault()
    with pytest.raises(RunError, match="NaN or infinity"):
        kfac_cp(W, A * float("nan"), G, 2)
    with pytest.raises(RunError, match="NaN or infinity"):
        kfac_cp(W, A, G * float("nan"), 2)
