"""WoodFisher (Singh and Alistarh 2020) for groups of weights, from the matrix of gradients. Tensors in, tensors out.

Symbols: X [N, p] gradients of N images with respect to the p weights of one layer, w [p]; F = lambda I + 1/N X^T X; S a channel's weights.
    loss   1/2 w_S^T ([F^-1]_SS)^-1 w_S = lambda/2 (||w_S||^2 + u^T M_S^-1 u),   u = X_S w_S,   M_S = lambda N I + X_rest X_rest^T
    update w += -F^-1_{:R} ([F^-1]_RR)^-1 w_R, jointly for everything removed R; with u = X_R w_R and M of the kept weights,
           w_K += X_K^T M^-1 u
Both follow from the Woodbury identity with N x N matrices only: F^-1 is never formed. The published recursion adds one gradient at a time
and gives the same F^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.curvature.linalg import inverse


def channel_losses(X: Tensor, w: Tensor, members: Tensor, damping: float) -> Tensor:
    """Loss [n] of removing each channel's weights members[c] ([n, m] indices into p) with all others compensated.

    damping: lambda, in units of the mean diagonal of X^T X / N (1 where that is zero).
    """
    X, w = X.double(), w.double()
    shift = damping_value(X, damping)
    gram = X @ X.T
    gram.diagonal().add_(shift * len(X))
    losses = []
    for indices in members:
        part = X[:, indices]
        u = part @ w[indices]
        losses.append(shift / 2 * (w[indices].square().sum() + u @ solve(gram - part @ part.T, u)))
    return torch.stack(losses)


def compensate(X: Tensor, w: Tensor, removed: Tensor, damping: float) -> Tensor:
    """w [p] float64 with the removed weights zero and the kept ones updated jointly."""
    X, w = X.double(), w.double()
    shift = damping_value(X, damping)
    kept = torch.ones(w.numel(), dtype=torch.bool, device=w.device)
    kept[removed] = False
    rest = X[:, kept]
    matrix = rest @ rest.T
    matrix.diagonal().add_(shift * len(X))
    updated = torch.zeros_like(w)
    updated[kept] = w[kept] + rest.T @ solve(matrix, X[:, ~kept] @ w[~kept])
    return updated


def damping_value(X: Tensor, damping: float) -> float:
    """lambda in absolute units."""
    mean = X.square().mean().item()
    return damping * (mean if mean > 0 else 1.0)


def solve(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix^-1 vector of a positive definite matrix; by the guarded inverse where rounding made it indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch.isfinite(factor).all() and not info.any():
        return torch.cholesky_solve(vector[:, None], factor)[:, 0]
    return inverse(matrix, 0.0, "gradient matrix") @ vector
