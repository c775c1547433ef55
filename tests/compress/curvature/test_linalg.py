"""Oracle: matrices of known spectrum, and numpy."""

import numpy as np
import pytest
import torch

from compress.curvature import linalg
from compress.errors import RunError
from tests.compress.curvature.nets import randn


def known(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(randn(len(values), len(values), seed=seed))[0]
    return (q * values) @ q.T


def test_eigenvalues_and_vectors_of_a_known_spectrum():
    matrix = known([1e-6, 0.5, 2.0, 7.0])
    spectrum = linalg.eigh(matrix)
    torch.testing.assert_close(spectrum.values, torch.tensor([1e-6, 0.5, 2.0, 7.0], dtype=torch.float64), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close((spectrum.vectors * spectrum.values) @ spectrum.vectors.T, matrix)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rounding_is_cut_relative_to_the_largest_eigenvalue(scale):
    spectrum = linalg.eigh(scale * known([-1e-17, 1e-17, 1e-6, 1.0]))
    assert (spectrum.values[:2] == 0).all() and spectrum.values[2].item() == pytest.approx(scale * 1e-6, rel=1e-6)
    cut = linalg.eigh(scale * known([1e-9, 1e-4, 1.0]), relative=1e-6)
    assert cut.values[0] == 0 and cut.values[1] > 0


def test_an_asymmetric_float32_matrix_is_symmetrised_in_float64():
    matrix = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    torch.testing.assert_close(linalg.eigh(matrix).values, torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_zero_and_batched_matrices():
    spectrum = linalg.eigh(torch.stack([torch.zeros(3, 3), torch.eye(3)]))
    assert spectrum.values.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert torch.isfinite(linalg.inverse(torch.zeros(3, 3), 1e-4)).all()


def test_a_solver_that_fails_is_tried_again_with_a_shift_and_then_by_singular_values(monkeypatch):
    matrix, calls = known([1.0, 2.0, 3.0]), []
    solve = torch.linalg.eigh

    def failing(argument, until):
        calls.append(argument)
        if len(calls) <= until:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(argument)

    for until in (2, 99):
        calls.clear()
        monkeypatch.setattr(torch.linalg, "eigh", lambda argument, until=until: failing(argument, until))
        spectrum = linalg.eigh(matrix)
        torch.testing.assert_close(spectrum.values, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        torch.testing.assert_close((spectrum.vectors * spectrum.values) @ spectrum.vectors.T, matrix)
        assert len(calls) == (3 if until == 2 else 4)


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1.0])
def test_powers_equal_numpy(exponent):
    matrix = known([0.5, 1.0, 4.0])
    values, vectors = np.linalg.eigh(matrix.numpy())
    expected = torch.from_numpy((vectors * values**exponent) @ vectors.T)
    torch.testing.assert_close(linalg.power(linalg.eigh(matrix), exponent), expected)


def test_negative_powers_of_a_singular_matrix_are_the_pseudo_inverse():
    matrix = known([0.0, 1.0, 4.0])
    torch.testing.assert_close(linalg.power(linalg.eigh(matrix), -1.0), torch.linalg.pinv(matrix, hermitian=True), rtol=1e-6, atol=1e-9)


def test_inverse_damps_relative_to_the_mean_diagonal():
    matrix = known([0.5, 1.0, 4.5])
    torch.testing.assert_close(linalg.inverse(matrix, 0.1), torch.linalg.inv(matrix + 0.2 * torch.eye(3, dtype=torch.float64)))
    torch.testing.assert_close(linalg.inverse(known([-1e-14, 1.0]), 0.0) @ known([0.0, 1.0]), known([0.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_the_name(value):
    with pytest.raises(RunError, match="moment of layer 'x' holds NaN or infinity"):
        linalg.eigh(torch.full((2, 2), value), "moment of layer 'x'")
