"""Low rank that is optimal for the K-FAC loss 1/2 tr(G (W - Z) A (W - Z)^T). Tensors in, `Factors` out.

Symbols: W [o, c] or [o, c, kh, kw], kk = kh kw; A over patches [c kk (+ 1), ...] or channels [c, c]; G [o, o]; C = A over channels.
With M = G^(1/2) W A^(1/2) = U S V^T the best Z of rank r is G^(-1/2) U_r S_r V_r^T A^(-1/2) and costs D(r) = 1/2 sum_{j > r} s_j^2
(generalised Eckart and Young). A and G are damped by a fraction of their mean eigenvalue. Factors come out with orthonormal outer
sides (`factors.orthonormalise`): taken raw they are scaled so badly that fine-tuning loses accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.curvature.linalg import Spectrum, damp, damped, eigh, kron, power
from compress.curvature.quadratic import channel_moment, patch_moment
from compress.decompose.checks import check_damping, check_moments, check_rank, check_ranks, check_sweeps, check_weight
from compress.decompose.factors import Factors, orthonormalise
from compress.decompose.unweighted import SVD_MODES, from_matrices, hooi, matricise
from compress.errors import UserError

DAMPING = 1e-4

def _roots(moment: Tensor, name: str, damping: float) -> tuple[Tensor, Tensor, Spectrum]:
    """S^(1/2), S^(-1/2) and the damped spectrum."""
    spectrum = eigh(moment, name)
    if damping:
        spectrum = Spectrum(spectrum.vectors, damped(spectrum, damping))
    return power(spectrum, 0.5), power(spectrum, -0.5), spectrum


def whitened_spectrum(weight: Tensor, A: Tensor, G: Tensor, damping: float = DAMPING) -> Tensor:
    """Singular values of M = G^(1/2) W A^(1/2), descending, float64; D(r) of `kfac_svd` is half the sum of squares of those after r."""
    check_weight(weight)
    check_moments(A, G, weight)
    check_damping(damping)
    root_a, root_g = (_roots(moment, name, damping)[0] for moment, name in ((patch_moment(A, weight), "A"), (G, "G")))
    return torch.linalg.svdvals(root_g @ weight.detach().double().flatten(1) @ root_a)


def kfac_svd(weight: Tensor, A: Tensor, G: Tensor, rank: int, mode: str = "output", damping: float = DAMPING) -> Factors:
    """Two factors of the given rank that cost the least K-FAC loss.

    mode: as in `svd`. "output" (and every matrix) is the exact optimum under the full A; "input" and "spatial" whiten the channels only.

    Raises
    ------
    UserError: rank or mode out of range, A or G of another layer, negative damping. RunError: A or G not finite.
    """
    check_weight(weight)
    check_moments(A, G, weight)
    check_damping(damping)
    if mode not in SVD_MODES:
        raise UserError(f"Unknown SVD mode {mode!r}; known: {', '.join(SVD_MODES)}.")
    dense = weight.detach().double()
    check_rank("rank", rank, min(matricise(dense, mode).shape))
    root_g, back_g, _ = _roots(G, "G", damping)
    if mode == "output" or weight.ndim == 2:
        root_a, back_a, _ = _roots(patch_moment(A, weight), "A", damping)
        u, s, v = torch.linalg.svd(root_g @ dense.flatten(1) @ root_a, full_matrices=False)
        left, right = back_g @ u[:, :rank], s[:rank, None] * v[:rank] @ back_a
        factors = from_matrices(left, right, weight.shape, mode)
    else:
        root_c, back_c, _ = _roots(channel_moment(A, weight), "A", damping)
        u, s, v = torch.linalg.svd(matricise(torch.einsum("po,ockl,cd->pdkl", root_g, dense, root_c), mode), full_matrices=False)
        factors = _unwhiten(from_matrices(u[:, :rank] * s[:rank], v[:rank], weight.shape, mode), back_g, back_c)
    return orthonormalise(factors).map(lambda tensor: tensor.to(weight.dtype).contiguous())


def _unwhiten(factors: Factors, back_g: Tensor, back_c: Tensor) -> Factors:
    """Whitening undone on the output channels of the last factor and the input channels of the first."""
    tensors = factors.tensors
    first, last = next(iter(tensors)), list(tensors)[-1]
    tensors[first] = torch.einsum("rc...,cd->rd...", tensors[first], back_c)
    tensors[last] = torch.einsum("po,or...->pr...", back_g, tensors[last])
    return Factors(tensors.get("input"), tensors.get("core"), tensors.get("output"))


def kfac_tucker2(weight: Tensor, A: Tensor, G: Tensor, ranks: tuple[int, int], refit: bool = True, damping: float = DAMPING,
                 sweeps: int = 25) -> Factors:
    """Tucker-2 of the whitened weight T = W x_o G^(1/2) x_c C^(1/2), with the output basis and core refitted under the full A.

    HOOI starts from the HOSVD and from EigenDamage's own input subspace, and the better result is kept: never worse than EigenDamage in
    the metric used. `refit` (needs A over patches) fixes the input span V = orth(C^(-1/2) V_T) and solves for output basis and core
    exactly: with B = V (x) I_kk and H = B^T A B, Z = G^(-1/2) [G^(1/2) W A B H^(-1/2)]_(r_o) H^(-1/2) B^T.

    Parameters
    ----------
    ranks: (r_o, r_c), in 1 .. o and 1 .. c; with `refit` r_o beyond r_c kk adds nothing and is filled with zeros.

    Raises
    ------
    UserError: no pair of ranks in range, A or G of another layer, negative damping, no sweep. RunError: A or G not finite.
    """
    check_weight(weight)
    r_out, r_in = check_ranks(ranks, weight)
    check_moments(A, G, weight)
    check_damping(damping)
    check_sweeps(sweeps)
    dense = weight.detach().double().reshape(*weight.shape[:2], -1)
    root_g, back_g, spectrum_g = _roots(G, "G", damping)
    root_c, back_c, spectrum_c = _roots(channel_moment(A, weight), "A", damping)
    whitened = torch.einsum("po,ocm,cd->pdm", root_g, dense, root_c)
    u_out, u_in = _best_subspaces(whitened, spectrum_g, spectrum_c, (r_out, r_in), sweeps)
    kernel = weight.shape[2:]
    if refit and A.shape[-1] >= dense[0].numel() and dense.shape[2] > 1:
        span = torch.linalg.qr(back_c @ u_in)[0].contiguous()
        full = damp(patch_moment(A, weight), damping)
        basis = kron(span, torch.eye(dense.shape[2], dtype=dense.dtype, device=dense.device))
        back_h = _roots(basis.T @ full @ basis, "A", 0.0)[1]
        u, s, v = torch.linalg.svd(root_g @ dense.flatten(1) @ full @ basis @ back_h, full_matrices=False)
        rank = min(r_out, s.numel())
        core = torch.zeros(r_out, basis.shape[1], dtype=dense.dtype, device=dense.device)
        left = torch.zeros(weight.shape[0], r_out, dtype=dense.dtype, device=dense.device)
        core[:rank], left[:, :rank] = s[:rank, None] * v[:rank] @ back_h, back_g @ u[:, :rank]
        factors = Factors(span.T, core.reshape(r_out, r_in, *kernel), left)
    else:
        core = torch.einsum("ocm,op,cq->pqm", whitened, u_out, u_in)
        factors = Factors(u_in.T @ back_c, core.reshape(r_out, r_in, *kernel), back_g @ u_out)
    return orthonormalise(factors).map(lambda tensor: tensor.to(weight.dtype).contiguous())


def _best_subspaces(
    whitened: Tensor, spectrum_g: Spectrum, spectrum_c: Spectrum, ranks: tuple[int, int], sweeps: int
) -> tuple[Tensor, Tensor]:
    """HOOI from the HOSVD and from the eigenvectors that EigenDamage would keep; the subspaces with the larger energy."""
    rotated = torch.einsum("ocm,cd->odm", whitened, spectrum_c.vectors)
    keep = rotated.square().sum((0, 2)).argsort(descending=True)[: ranks[1]]
    results = [hooi(whitened, ranks, start, sweeps) for start in (None, spectrum_c.vectors[:, keep])]
    energies = [torch.einsum("ocm,op,cq->pqm", whitened, *pair).square().sum() for pair in results]
    return results[0] if energies[0] >= energies[1] else results[1]
