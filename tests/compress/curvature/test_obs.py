"""Oracle: constrained least squares by the KKT system (tests/oracles/obs.py), torch.linalg.lstsq on patches, WoodFisher's recursion."""

import pytest
import torch

from compress.curvature import obs, woodfisher
from compress.errors import RunError
from tests.compress.curvature.nets import randn
from tests.oracles.obs import constrained_minimum, woodfisher_inverse


def moment(size, seed):
    x = randn(size, 3 * size, seed=seed)
    return x @ x.T / (3 * size)


W, A, G = randn(5, 6), moment(6, 1), moment(5, 2)
MODEL = obs.LossModel(W, A, G, damping=0.0)
FLAT = torch.arange(30).reshape(5, 6)


def test_row_scores_are_the_exact_losses_with_and_without_compensation():
    rows = torch.tensor([[0, 3], [1, 2], [4, 0]])
    for row, plain, compensated in zip(rows, obs.rows_obd(MODEL, rows), obs.rows_obs(MODEL, rows), strict=True):
        zeroed = W.clone()
        zeroed[row] = 0
        torch.testing.assert_close(plain, obs.joint_loss(W, zeroed, A, G))
        torch.testing.assert_close(compensated, constrained_minimum(W.flatten(), torch.kron(G, A), FLAT[row].flatten())[1])


def test_column_scores_are_the_exact_losses_with_and_without_compensation():
    columns = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for column, plain, compensated in zip(columns, obs.columns_obd(MODEL, columns), obs.columns_obs(MODEL, columns), strict=True):
        zeroed = W.clone()
        zeroed[:, column] = 0
        torch.testing.assert_close(plain, obs.joint_loss(W, zeroed, A, G))
        torch.testing.assert_close(compensated, constrained_minimum(W.flatten(), torch.kron(G, A), FLAT[:, column].flatten())[1])


def test_element_scores_add_the_losses_of_single_weights():
    single = torch.stack([constrained_minimum(W.flatten(), torch.kron(G, A), place[None])[1] for place in FLAT.flatten()]).reshape(5, 6)
    rows, columns = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0, 1], [2, 5], [4, 3]])
    torch.testing.assert_close(obs.row_elements_obs(MODEL, rows), single[rows].sum((1, 2)))
    torch.testing.assert_close(obs.column_elements_obs(MODEL, columns), single.T[columns].sum((1, 2)))


@pytest.mark.parametrize("removed", [[1], [0, 2, 4]])
def test_row_update_is_the_constrained_minimum(removed):
    removed = torch.tensor(removed)
    dw, loss = constrained_minimum(W.flatten(), torch.kron(G, A), FLAT[removed].flatten())
    updated = obs.compensate_rows(W, G, removed, damping=0.0)
    torch.testing.assert_close(updated, W + dw.reshape(5, 6))
    torch.testing.assert_close(obs.joint_loss(W, updated, A, G), loss)


@pytest.mark.parametrize("removed", [[1], [0, 2, 4]])
def test_column_update_is_the_constrained_minimum(removed):
    removed = torch.tensor(removed)
    dw, _ = constrained_minimum(W.flatten(), torch.kron(G, A), FLAT[:, removed].flatten())
    torch.testing.assert_close(obs.compensate_columns(W, A, removed, damping=0.0), W + dw.reshape(5, 6))


def test_rows_and_columns_together_are_the_constrained_minimum():
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 5])
    gone = torch.cat([FLAT[rows].flatten(), FLAT[:, columns].flatten()]).unique()
    dw, loss = constrained_minimum(W.flatten(), torch.kron(G, A), gone)
    updated = obs.compensate_rows(obs.compensate_columns(W, A, columns, damping=0.0), G, rows, damping=0.0)
    torch.testing.assert_close(updated, W + dw.reshape(5, 6))
    torch.testing.assert_close(obs.joint_loss(W, updated, A, G), loss)


def test_the_joint_update_is_never_worse_than_one_row_at_a_time():
    removed = torch.tensor([0, 2, 4])
    inverse = torch.linalg.inv(G)
    single = W - sum(inverse[:, i:i + 1] * W[i] / inverse[i, i] for i in removed.tolist())
    single[removed] = 0
    joint = obs.joint_loss(W, obs.compensate_rows(W, G, removed, damping=0.0), A, G)
    assert joint < obs.joint_loss(W, single, A, G)
    zeroed = W.clone()
    zeroed[removed] = 0
    assert joint < obs.joint_loss(W, zeroed, A, G)


def test_column_update_equals_least_squares_on_the_patches():
    patches = randn(40, 6, seed=5)
    kept, gone = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    best = torch.linalg.lstsq(patches[:, kept], patches @ W.T).solution.T
    updated = obs.compensate_columns(W, patches.T @ patches, gone, damping=0.0)
    torch.testing.assert_close(updated[:, kept], best)
    assert (updated[:, gone] == 0).all()


def test_dependent_inputs_are_removed_without_loss():
    patches = randn(40, 5, seed=5)
    patches = torch.cat([patches, patches[:, :2] @ randn(2, 1, seed=6)], 1)
    updated = obs.compensate_columns(W, patches.T @ patches / 40, torch.tensor([5]), damping=0.0)
    torch.testing.assert_close(patches @ updated.T, patches @ W.T)
    moments = patches.T @ patches / 40
    assert obs.columns_obs(obs.LossModel(W, moments, G, damping=1e-12), torch.tensor([[5]])).item() < 1e-8


def test_singular_and_zero_moments_give_finite_results_and_nan_is_refused():
    zero = torch.zeros(6, 6, dtype=torch.float64)
    assert torch.equal(obs.compensate_columns(W, zero, torch.tensor([1]))[:, [0, 2, 3, 4, 5]], W[:, [0, 2, 3, 4, 5]])
    assert torch.isfinite(obs.columns_obs(obs.LossModel(W, zero, G), torch.arange(6)[:, None])).all()
    low = randn(6, 2)
    assert torch.isfinite(obs.compensate_columns(W, low @ low.T, torch.tensor([1, 3]), damping=0.0)).all()
    with pytest.raises(RunError, match="NaN"):
        obs.compensate_columns(W, zero * float("nan"), torch.tensor([1]))


@pytest.mark.parametrize("images, columns", [(7, 4096), (40, 4096), (40, 5)])
def test_woodfisher_equals_the_recursion(images, columns, monkeypatch):
    monkeypatch.setattr(woodfisher, "COLUMNS", columns)
    X, w = randn(images, 12), randn(12, seed=1)
    shift = 0.1 * X.square().mean()
    inverse = woodfisher_inverse(X, shift)
    members = torch.tensor([[0, 1, 2], [3, 7, 11], [9, 4, 5]])
    for indices, loss in zip(members, woodfisher.channel_losses(X, woodfisher.gram(X), w, members, 0.1), strict=True):
        expected = w[indices] @ torch.linalg.solve(inverse[indices[:, None], indices], w[indices]) / 2
        torch.testing.assert_close(loss, expected)
    removed = torch.tensor([0, 1, 2, 9])
    dw, _ = constrained_minimum(w, torch.linalg.inv(inverse), removed)
    torch.testing.assert_close(woodfisher.compensate(X, w, removed, 0.1), w + dw, rtol=1e-6, atol=1e-9)


def test_woodfisher_without_gradients_is_the_squared_norm():
    w = randn(6)
    losses = woodfisher.channel_losses(torch.zeros(3, 6), torch.zeros(3, 3), w, torch.arange(6).reshape(3, 2), 0.5)
    torch.testing.assert_close(losses, w.reshape(3, 2).square().sum(1) / 4)
