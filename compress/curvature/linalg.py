"""Guarded linear algebra on second-moment matrices: eigenvalues, square roots, damped inverses. Tensors in, tensors out.

Symbols: S [..., d, d] symmetric, positive semidefinite up to rounding. A covariance summed in float32 has negative eigenvalues of the
size of its rounding; they are cut relative to the largest one, never at an absolute value (gradients of a converged network make G
tiny as a whole).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import RunError


class Spectrum(NamedTuple):
    """Eigenvectors [..., d, d] in columns and eigenvalues [..., d] ascending, non-negative, float64."""

    vectors: Tensor
    values: Tensor


def symmetrise(matrix: Tensor) -> Tensor:
    """(S + S^T) / 2 in float64."""
    matrix = matrix.double()
    return (matrix + matrix.transpose(-1, -2)) / 2


def eigh(matrix: Tensor, name: str = "matrix", relative: float | None = None) -> Spectrum:
    """Eigendecomposition of a positive semidefinite matrix, symmetrised, in float64.

    Eigenvalues below `relative` (default d times the float64 rounding) times the largest are set to zero. Where LAPACK does not converge
    it is tried again with a growing diagonal shift, then on the CPU by singular values.

    Raises
    ------
    RunError: the matrix holds NaN or infinity (`name` is quoted), or nothing converged.
    """
    matrix = symmetrise(matrix)
    if not torch.isfinite(matrix).all():
        raise RunError(f"The {name} holds NaN or infinity; check the network's activations and gradients on the calibration data.")
    size = matrix.shape[-1]
    relative = size * torch.finfo(torch.float64).eps if relative is None else relative
    values, vectors = _solve(matrix, name)
    largest = values.amax(-1, keepdim=True).clamp_min(0)
    return Spectrum(vectors.contiguous(), torch.where(values > relative * largest, values, torch.zeros_like(values)))


def _solve(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for shift in (0.0, 1e-14, 1e-12, 1e-10):
        try:
            values, vectors = torch.linalg.eigh(matrix + shift * scale * identity)
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(vectors).all():
            return values - shift * scale[..., 0], vectors
    try:
        vectors, values, _ = torch.linalg.svd(matrix.cpu())
    except torch.linalg.LinAlgError as error:
        raise RunError(
            f"The eigendecomposition of the {name} of size {matrix.shape[-1]} did not converge; use more calibration data."
        ) from error
    return values.flip(-1).to(matrix.device), vectors.flip(-1).to(matrix.device)


def damped(spectrum: Spectrum, damping: float) -> Tensor:
    """Eigenvalues plus `damping` times their mean; a zero matrix gets `damping` itself so that inverses exist."""
    mean = spectrum.values.mean(-1, keepdim=True)
    return spectrum.values + damping * torch.where(mean > 0, mean, torch.ones_like(mean))


def power(spectrum: Spectrum, exponent: float, damping: float = 0.0) -> Tensor:
    """S^exponent [..., d, d]; on undamped zero eigenvalues negative powers are zero (pseudo-inverse)."""
    values = damped(spectrum, damping) if damping else spectrum.values
    powered = torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny) ** exponent, torch.zeros_like(values))
    return (spectrum.vectors * powered[..., None, :]) @ spectrum.vectors.transpose(-1, -2)


def damp(matrix: Tensor, damping: float) -> Tensor:
    """S plus `damping` times its mean diagonal (1 for a zero matrix) on the diagonal, symmetrised, float64."""
    matrix = symmetrise(matrix).clone()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return matrix


def inverse(matrix: Tensor, damping: float, name: str = "matrix") -> Tensor:
    """(S + damping mean(diag S) I)^-1 by Cholesky, by eigenvalues where that fails.

    Raises
    ------
    RunError: NaN or infinity in the matrix.
    """
    shifted = damp(matrix, damping)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if torch.isfinite(factor).all() and not info.any():
        return torch.cholesky_inverse(factor)
    return power(eigh(shifted, name), -1.0)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker product of two matrices; `torch.kron` raises for some memory layouts of thin matrices."""
    (a, b), (c, d) = left.shape, right.shape
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(a * c, b * d)
