"""WoodFisher (Singh and Alistarh 2020) for groups of weights, from gradients of single images. Tensors in, tensors out.

Symbols: X [N, p] gradients of N images with respect to the p weights of one layer, w [p]; F = lambda I + 1/N X^T X; S a channel's weights.

F block-diagonal, one block per channel: nothing to compensate with,
    loss   1/2 w_S^T F_SS w_S = 1/2 (lambda ||w_S||^2 + ||u||^2 / N),   u = X_S w_S, a sum of `projections`
F of the whole layer:
    loss   1/2 w_S^T ([F^-1]_SS)^-1 w_S = lambda/2 (||w_S||^2 + u^T M_S^-1 u),   M_S = lambda N I + X_rest X_rest^T
    update w += -F^-1_{:R} ([F^-1]_RR)^-1 w_R, jointly for everything removed R; with u = X_R w_R and M of the kept weights,
           w_K += X_K^T M^-1 u
Both follow from the Woodbury identity with N x N matrices only: F^-1 is never formed. The published recursion adds one gradient at a time
and gives the same F^-1. X may be float32: sums are formed in float64 over some columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.curvature.linalg import inverse

COLUMNS = 4096  # of X that are held in float64 at a time


def projections(X: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Per image, gradient times weight summed over each slice of a dimension of the weight: [N, weight.shape[dim]] float64."""
    products = (X * weight.flatten()).reshape(-1, *weight.shape)
    return products.movedim(dim + 1, 1).flatten(2).sum(2, dtype=torch.float64)


def gram(X: Tensor) -> Tensor:
    """X X^T [N, N] float64."""
    total = X.new_zeros(len(X), len(X), dtype=torch.float64)
    for columns in _chunks(X):
        part = X[:, columns].double()
        total += part @ part.T
    return total


def channel_losses(X: Tensor, product: Tensor, w: Tensor, members: Tensor, damping: float) -> Tensor:
    """Loss [n] of removing each channel's weights members[c] ([n, m] indices into p) with all others compensated.

    product: `gram(X)`. damping: lambda, in units of the mean diagonal of X^T X / N (1 where that is zero).
    """
    w = w.double()
    shift = damping_value(product.trace().item(), X.numel(), damping)
    shifted = product + shift * len(X) * torch.eye(len(X), dtype=product.dtype, device=product.device)
    losses = []
    for indices in members:
        part = X[:, indices].double()
        u = part @ w[indices]
        losses.append(shift / 2 * (w[indices].square().sum() + u @ solve(shifted - part @ part.T, u)))
    return torch.stack(losses)


def compensate(X: Tensor, w: Tensor, removed: Tensor, damping: float) -> Tensor:
    """w [p] float64 with the removed weights zero and the kept ones updated jointly."""
    w = w.double()
    kept = torch.ones(w.numel(), dtype=torch.bool, device=w.device)
    kept[removed] = False
    matrix, u, total = X.new_zeros(len(X), len(X), dtype=torch.float64), 0, 0.0
    for columns in _chunks(X):
        part, stays = X[:, columns].double(), kept[columns]
        total += part.square().sum().item()
        u = u + part[:, ~stays] @ w[columns][~stays]
        part = part[:, stays]
        matrix += part @ part.T
    matrix.diagonal().add_(damping_value(total, X.numel(), damping) * len(X))
    solution = solve(matrix, u)
    updated = torch.cat([w[columns] + X[:, columns].double().T @ solution for columns in _chunks(X)])
    updated[removed] = 0
    return updated


def damping_value(squares: float, count: int, damping: float) -> float:
    """lambda in absolute units, from the sum of the squares of all `count` elements of X."""
    return damping * (squares / count if squares > 0 else 1.0)


def _chunks(X: Tensor) -> Iterator[slice]:
    return (slice(start, start + COLUMNS) for start in range(0, X.shape[1], COLUMNS))


def solve(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix^-1 vector of a positive definite matrix; by the guarded inverse where rounding made it indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch.isfinite(factor).all() and not info.any():
        return torch.cholesky_solve(vector[:, None], factor)[:, 0]
    return inverse(matrix, 0.0, "gradient matrix") @ vector
