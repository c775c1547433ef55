"""The K-FAC quadratic model of the loss: shapes of second moments, and the loss that a change of weights costs.

Symbols: W [o, c] or [o, c, kh, kw] with kk = kh kw; A second moment of the input patches in the order (c, kh, kw) [c kk, c kk], with a
last row and column for the bias if there is one, or channel-only [c, c], which stands for A (x) I_kk; G [o, o].
Predicted loss of a change D: 1/2 tr(G D A D^T) (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.curvature.linalg import kron
from compress.errors import UserError


def _offsets(weight: Tensor) -> int:
    return weight[0, 0].numel()


def patch_moment(A: Tensor, weight: Tensor) -> Tensor:
    """A over the flattened weight, [c kk, c kk] float64: the bias row dropped, a channel-only moment expanded to A (x) I_kk.

    Raises
    ------
    UserError: A fits neither the patches nor the channels of the weight.
    """
    columns, channels, offsets = weight[0].numel(), weight.shape[1], _offsets(weight)
    size = A.shape[-1]
    A = A.double()
    if size in (columns, columns + 1):
        return A[..., :columns, :columns]
    if size == channels:
        return kron(A, torch.eye(offsets, dtype=A.dtype, device=A.device))
    raise UserError(f"A second moment of size {size} does not belong to a weight of shape {tuple(weight.shape)}; "
                    f"expected {columns} (patches), {columns + 1} (with bias) or {channels} (channels).")


def channel_moment(A: Tensor, weight: Tensor) -> Tensor:
    """A over the input channels, [c, c] float64: diagonal blocks averaged over the kernel offsets (exactly the channel-only moment).

    Raises
    ------
    UserError: A fits neither the patches nor the channels of the weight.
    """
    channels, offsets = weight.shape[1], _offsets(weight)
    if A.shape[-1] == channels:
        return A.double()
    full = patch_moment(A, weight).reshape(channels, offsets, channels, offsets)
    return torch.einsum("cidi->cd", full) / offsets


def spatial_moment(A: Tensor, weight: Tensor) -> Tensor:
    """A over the kernel offsets, [kk, kk] float64: trace over channels, scaled to trace kk (the partial-trace model C (x) K)."""
    channels, offsets = weight.shape[1], _offsets(weight)
    full = patch_moment(A, weight).reshape(channels, offsets, channels, offsets)
    traced = torch.einsum("cicj->ij", full)
    trace = traced.trace()
    return traced * (offsets / trace) if trace > 0 else torch.eye(offsets, dtype=full.dtype, device=full.device)


def nearest_kronecker(A: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """C [c, c] and K [kk, kk] minimising ||A - C (x) K||_F (Van Loan and Pitsianis 1993), positive semidefinite, K scaled to trace kk.

    The dominant singular pair of the rearranged matrix is semidefinite up to one common sign, which is fixed by the trace of K. The published
    rule, a positive sum over the entries of C, gives the same sign: 1^T C 1 >= 0 wherever C is semidefinite.
    """
    channels, offsets = weight.shape[1], _offsets(weight)
    full = patch_moment(A, weight)
    rearranged = full.reshape(channels, offsets, channels, offsets).permute(0, 2, 1, 3).reshape(channels**2, offsets**2)
    gram = rearranged.T @ rearranged
    vector = torch.linalg.eigh(gram)[1][:, -1]
    spatial = vector.reshape(offsets, offsets)
    spatial = spatial if spatial.trace() >= 0 else -spatial
    channel = (rearranged @ spatial.flatten()).reshape(channels, channels)
    trace = spatial.trace()
    if trace <= 0:
        return channel_moment(A, weight), torch.eye(offsets, dtype=full.dtype, device=full.device)
    return channel * (trace / offsets), spatial * (offsets / trace)


def predicted_loss(change: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """1/2 tr(G D A D^T) for a change D of the weight's shape; a float64 scalar. A as in the module docstring."""
    if A.shape[-1] == change.shape[1] and change.ndim == 4:
        flat = change.double().flatten(2)
        return torch.einsum("ocm,cd,pdm,op->", flat, A.double(), flat, G.double()) / 2
    flat = change.double().flatten(1)
    return ((G.double() @ flat @ patch_moment(A, change)) * flat).sum() / 2
