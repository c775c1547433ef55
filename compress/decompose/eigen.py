"""EigenDamage (Wang, Grosse, Fidler, Zhang 2019) on one layer: rotate into the Kronecker-factored eigenbasis, keep rows and columns.

Symbols: W [o, c] or [o, c, kh, kw], kk = kh kw; A = Q_A diag(a) Q_A^T over input channels [c, c], G = Q_G diag(g) Q_G^T [o, o].
    W' = W x_o Q_G^T x_c Q_A^T      Theta_ij = sum_kk W'_ij,kk^2 s_ij,kk,   s = g_i a_j, or the EKFAC second moments
    row importance R_i = sum_j Theta_ij,   column importance C_j = sum_i Theta_ij    (the loss is half of these)
A kept selection gives three factors: Q_A[:, keep]^T, W'[keep, keep], Q_G[:, keep].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.curvature.linalg import Spectrum, eigh
from compress.curvature.quadratic import channel_moment
from compress.decompose.checks import check_moments, check_rank, check_ranks, check_second, check_weight
from compress.decompose.factors import Factors
from compress.decompose.unweighted import cp
from compress.errors import UserError

SPLITS = ("cp", "svd")


def bases(weight: Tensor, A: Tensor, G: Tensor, name: str = "layer") -> tuple[Spectrum, Spectrum]:
    """Eigendecompositions of A over the channels and of G. Raises RunError on NaN, UserError if A is of another layer."""
    return eigh(channel_moment(A, weight), f"input moment of {name}"), eigh(G, f"gradient moment of {name}")


def rotate(weight: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """W x_o Q_G^T x_c Q_A^T in float64, of the weight's shape [r_o, r_c, ...] for bases [o, r_o] and [c, r_c]."""
    return torch.einsum("oc...,op,cq->pq...", weight.detach().double(), basis_out, basis_in)


def importance(weight: Tensor, spectrum_in: Spectrum, spectrum_out: Spectrum, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row importances [o] and column importances [c], float64, in the units of the loss times two.

    second: EKFAC second moments in this eigenbasis, [o, c] or [o, c, kk]; the products of the eigenvalues if None.
    """
    rotated = rotate(weight, spectrum_in.vectors, spectrum_out.vectors).reshape(*weight.shape[:2], -1)
    if second is None:
        second = spectrum_out.values[:, None] * spectrum_in.values
    theta = (rotated.square() * second.reshape(*weight.shape[:2], -1)).sum(2)
    return theta.sum(1), theta.sum(0)


def keep_coordinates(weight: Tensor, basis_in: Tensor, basis_out: Tensor, keep_out: Tensor, keep_in: Tensor) -> Factors:
    """The three factors that keep the given coordinates of the eigenbases; dtype of the weight."""
    q_in, q_out = basis_in[:, keep_in], basis_out[:, keep_out]
    factors = Factors(q_in.T, rotate(weight, q_in, q_out), q_out)
    return factors.map(lambda tensor: tensor.to(weight.dtype).contiguous())


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; equal scores keep the later index (eigenvalues ascend)."""
    return scores.flip(0).argsort(descending=True, stable=True)[:count].mul(-1).add(scores.numel() - 1).sort().values


def eigendamage(weight: Tensor, A: Tensor, G: Tensor, ranks: tuple[int, int], second: Tensor | None = None) -> Factors:
    """EigenDamage at given ranks: the r_o most important rows and r_c most important columns of the eigenbasis.

    Parameters
    ----------
    A: over channels, or over patches (averaged over the offsets here). G: [o, o].
    ranks: (r_o, r_c). second: EKFAC second moments in the eigenbasis of this very A and G.

    Raises
    ------
    UserError: no pair of ranks in range, A, G or `second` of another layer. RunError: A or G not finite.
    """
    check_weight(weight)
    r_out, r_in = check_ranks(ranks, weight)
    check_moments(A, G, weight)
    check_second(second, weight)
    spectrum_in, spectrum_out = bases(weight, A, G)
    rows, columns = importance(weight, spectrum_in, spectrum_out, second)
    return keep_coordinates(weight, spectrum_in.vectors, spectrum_out.vectors, top(rows, r_out), top(columns, r_in))


def merge_outer(outer: Factors, inner: Factors) -> Factors:
    """Factors of an already factorized layer whose core was decomposed into `inner`: the rotations join the outer factors."""
    return replace(inner, input=_product(inner.input, outer.input), output=_product(outer.output, inner.output))


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return left if right is None else right
    return left @ right


def depthwise(factors: Factors, rank: int | None = None, method: str = "cp") -> Factors:
    """The depthwise-separable variant: the core [r_o, r_c, kh, kw] becomes 1x1, depthwise kh x kw, 1x1, and the 1x1 parts are merged.

    method: "cp" (alternating least squares), or "svd": bases of the core's mean over the offsets, of which the diagonal is kept.
    rank: default min(r_o, r_c).

    Raises
    ------
    UserError: rank out of range, unknown method, or factors without an ungrouped kh x kw core.
    """
    core = factors.core
    if method not in SPLITS:
        raise UserError(f"Unknown way to split a core {method!r}; known: {', '.join(SPLITS)}.")
    if core is None or core.ndim != 4 or factors.depthwise or factors.groups > 1:
        raise UserError("The depthwise variant needs factors with a core [r_o, r_c, kh, kw] in one group that is not depthwise already.")
    rank = min(core.shape[:2]) if rank is None else rank
    if method == "cp":
        return merge_outer(factors, cp(core, rank))
    check_rank("rank", rank, min(core.shape[:2]))
    u, _, v = torch.linalg.svd(core.double().mean((2, 3)))
    left, right = u[:, :rank], v[:rank].T
    diagonal = torch.einsum("pqkl,pr,qr->rkl", core.double(), left, right).unsqueeze(1)
    inner = Factors(right.T, diagonal, left, depthwise=True).map(lambda tensor: tensor.to(core.dtype).contiguous())
    return merge_outer(factors, inner)
