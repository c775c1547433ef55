"""Loss and compensation of removed rows (outputs) and columns (inputs) of a layer under the K-FAC model. Tensors in, tensors out.

Symbols, one group of one layer: W [o, d] weights with the bias as last column if A has its row; A [d, d], G [o, o]; R, K removed and kept
rows; P, K removed and kept columns. Damping adds a fraction of the mean diagonal (`linalg.damp`). Losses include the factor 1/2.
    rows, no compensation     1/2 tr(G_RR W_R A W_R^T)                        (Kron-OBD)
    rows, compensated         1/2 tr(([G^-1]_RR)^-1 W_R A W_R^T)              (Kron-OBS),   W_K += G_KK^-1 G_KR W_R
    elements                  1/2 sum_ij w_ij^2 / ([G^-1]_ii [A^-1]_jj)       (C-OBS)
    columns, no compensation  1/2 tr(G W_P A_PP W_P^T)
    columns, compensated      1/2 tr(G W_P (A_PP - A_PK A_KK^-1 A_KP) W_P^T),     W_K += W_P A_PK A_KK^-1
The updates are joint over everything that is removed: the exact minimum (Hassibi and Stork 1993; Wang et al. 2019 correct one row at a
time). (A_PP - A_PK A_KK^-1 A_KP) = ([A^-1]_PP)^-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.curvature.linalg import damp, inverse

DAMPING = 1e-4


def _blocks(matrix: Tensor, indices: Tensor) -> Tensor:
    """matrix[indices[c], indices[c]] for every channel: [n, m, m] for indices [n, m]."""
    return matrix[indices[:, :, None], indices[:, None, :]]


def _traces(left: Tensor, right: Tensor) -> Tensor:
    """tr(L R) per channel of symmetric blocks [n, m, m]."""
    return (left * right).sum((1, 2))


def _inverses(blocks: Tensor) -> Tensor:
    return torch.linalg.inv(blocks) if blocks.shape[-1] > 1 else 1 / blocks


@dataclass
class LossModel:
    """The symbols of one group of one layer; what all its channels share is computed once."""

    W: Tensor
    A: Tensor
    G: Tensor
    damping: float = DAMPING

    @cached_property
    def row_moment(self) -> Tensor:
        """W A W^T [o, o]."""
        return self.W @ self.A @ self.W.T

    @cached_property
    def column_moment(self) -> Tensor:
        """W^T G W [d, d]."""
        return self.W.T @ self.G @ self.W

    @cached_property
    def A_inverse(self) -> Tensor:
        """A^-1, damped."""
        return inverse(self.A, self.damping, "input moment")

    @cached_property
    def G_inverse(self) -> Tensor:
        """G^-1, damped."""
        return inverse(self.G, self.damping, "gradient moment")

    @cached_property
    def elements(self) -> Tensor:
        """w_ij^2 / ([G^-1]_ii [A^-1]_jj) [o, d]."""
        return self.W.square() / (self.G_inverse.diagonal()[:, None] * self.A_inverse.diagonal())


def rows_obd(model: LossModel, rows: Tensor) -> Tensor:
    """Kron-OBD loss of each channel [n] that owns rows[c]; rows is [n, m]."""
    return _traces(_blocks(model.G, rows), _blocks(model.row_moment, rows)) / 2


def rows_obs(model: LossModel, rows: Tensor) -> Tensor:
    """Kron-OBS loss of each channel [n] after the other rows are compensated."""
    return _traces(_inverses(_blocks(model.G_inverse, rows)), _blocks(model.row_moment, rows)) / 2


def row_elements_obs(model: LossModel, rows: Tensor) -> Tensor:
    """C-OBS loss of each channel [n]: element-wise OBS saliencies added over its rows."""
    return model.elements.sum(1)[rows].sum(1) / 2


def columns_obd(model: LossModel, columns: Tensor) -> Tensor:
    """Loss of removing each channel's columns [n, m] without compensation."""
    return _traces(_blocks(model.A, columns), _blocks(model.column_moment, columns)) / 2


def columns_obs(model: LossModel, columns: Tensor) -> Tensor:
    """Loss of removing each channel's columns [n, m] after the other columns are compensated."""
    return _traces(_inverses(_blocks(model.A_inverse, columns)), _blocks(model.column_moment, columns)) / 2


def column_elements_obs(model: LossModel, columns: Tensor) -> Tensor:
    """Element-wise OBS saliencies added over each channel's columns."""
    return model.elements.sum(0)[columns].sum(1) / 2


def _split(size: int, removed: Tensor) -> tuple[Tensor, Tensor]:
    gone = torch.zeros(size, dtype=torch.bool, device=removed.device)
    gone[removed] = True
    return gone.nonzero().flatten(), (~gone).nonzero().flatten()


def regression(moment: Tensor, removed: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """(removed [r], kept [k], S_RK S_KK^-1 [r, k]): the removed coordinates predicted from the kept ones by least squares."""
    gone, kept = _split(moment.shape[-1], removed)
    moment = damp(moment, damping)
    inner = moment[kept[:, None], kept]
    cross = moment[gone[:, None], kept]
    factor, info = torch.linalg.cholesky_ex(inner)
    if torch.isfinite(factor).all() and not info.any():
        return gone, kept, torch.cholesky_solve(cross.T, factor).T
    return gone, kept, cross @ inverse(inner, 0.0, "second moment")


def compensate_columns(W: Tensor, A: Tensor, removed: Tensor, damping: float = DAMPING) -> Tensor:
    """W with the kept columns updated for the removed ones, which become zero; independent of G."""
    gone, kept, coefficients = regression(A, removed, damping)
    updated = torch.zeros_like(W)
    updated[:, kept] = W[:, kept] + W[:, gone] @ coefficients
    return updated


def compensate_rows(W: Tensor, G: Tensor, removed: Tensor, damping: float = DAMPING) -> Tensor:
    """W with the kept rows updated for the removed ones, which become zero; independent of A."""
    return compensate_columns(W.T, G, removed, damping).T


def joint_loss(W: Tensor, updated: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """1/2 tr(G D A D^T) of D = updated - W."""
    D = updated - W
    return ((G @ D @ A) * D).sum() / 2
