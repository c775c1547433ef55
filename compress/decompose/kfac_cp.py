"""CP of a convolution weight that is optimal for the K-FAC loss 1/2 tr(G (W - Z) A (W - Z)^T). Tensors in, `Factors` out.

Symbols: W [o, c kk]; Z = L B^T with L [o, R] output vectors and B [c kk, R], column r the product of an input vector [c] and a kernel [kk];
A over patches or channels, G [o, o]. For given B the best output vectors do not depend on G,
    L = W A B H^-1,   H = B^T A B,   and leave   1/2 tr(G W A W^T) - 1/2 tr(G N H^-1 N^T),   N = W A B   [o, R].
What is left is a function of B alone (variable projection, Golub and Pereyra 1973), minimised over all input vectors and kernels by L-BFGS.
A Cholesky factor T T^T = H turns the second term into 1/2 ||G^(1/2) N T^-T||_F^2, whose columns are what each further product explains: one
factorization gives the loss at every rank of a nested start (`nested_losses`).

What this leaves of the loss of `cp` on trained layers: benchmarks/results/kfac_cp.json.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from compress.curvature.linalg import damp, eigh, power
from compress.curvature.quadratic import patch_moment
from compress.decompose.checks import check_cp, check_damping, check_iterations, check_moments
from compress.decompose.factors import Factors
from compress.decompose.kfac import DAMPING
from compress.decompose.unweighted import cp_modes, from_modes, nested_svd, zero_cp
from compress.errors import RunError

RIDGE = 1e-9  # of the mean diagonal of H: products may be nearly dependent


@torch.inference_mode(False)  # the descent needs gradients of its own
def kfac_cp(weight: Tensor, A: Tensor, G: Tensor, rank: int, iterations: int = 50, damping: float = DAMPING, sweeps: int = 100) -> Factors:
    """1x1 (c -> R), depthwise kh x kw (R), 1x1 (R -> o) with the K-FAC loss brought down from that of `cp` by L-BFGS.

    The input vectors and kernels start from the nested SVD or from what `cp` makes of it, whichever leaves less; the loss (damped, up to the
    ridge) never ends above that of `cp` at this rank. A and G are damped by a fraction of their mean eigenvalue. Components have equal norms
    in the three factors.

    Parameters
    ----------
    weight: [o, c, kh, kw].
    A: input second moment over patches (with or without bias) or channels. G: [o, o].
    rank: 1 .. min(o c, o k k, c k k).
    iterations: of L-BFGS; 0 only refits the output vectors. One costs about 6 (c k k)^2 R operations in float64.
    sweeps: of the alternation from which it starts.

    Raises
    ------
    UserError: rank out of range, no convolution weight, A or G of another layer, negative damping or iterations, no sweep. RunError: A or G not finite.
    """
    weight, A, G = (part.clone() if isinstance(part, Tensor) and part.is_inference() else part for part in (weight, A, G))
    check_cp(weight, rank, sweeps)
    check_iterations(iterations)
    check_moments(A, G, weight)
    check_damping(damping)
    if not weight.any():
        return zero_cp(weight, rank)
    dense = weight.detach().double()
    model = Projected(dense, A, G, damping)
    starts = [(_unit(right), _unit(kernel)) for _, right, kernel in cp_modes(dense.flatten(2), rank, sweeps)]
    right, kernel = model.descend(*min(starts, key=lambda start: model.loss(*start).item()), iterations)
    return from_modes(model.outputs(right, kernel), right, kernel, weight)


def nested_losses(weight: Tensor, A: Tensor, G: Tensor, damping: float = DAMPING, largest: int | None = None) -> Tensor:
    """K-FAC loss [n + 1] that `kfac_cp` starts from at most at rank 0 .. n, float64, falling: the nested SVD's products, output vectors refitted.

    n is the number of products, or `largest` if smaller.
    """
    dense = weight.detach().double()
    model = Projected(dense, A, G, damping)
    if not weight.any():
        return dense.new_zeros(2)
    _, _, right, kernel = (modes[..., : min(largest or weight.numel(), dense[0].numel())] for modes in nested_svd(dense.flatten(2)))
    explained = model.explained(right, kernel).square().sum(0).cumsum(0) / 2
    return torch.cat([model.total[None], (model.total - explained).clamp_min(0)])


class Projected:
    """The K-FAC loss of one layer with the output vectors eliminated."""

    def __init__(self, dense: Tensor, A: Tensor, G: Tensor, damping: float) -> None:
        flat = dense.flatten(1)
        if not torch.isfinite(A).all():
            raise RunError("The A holds NaN or infinity; check the network's activations and gradients on the calibration data.")
        self.A = damp(patch_moment(A, dense), damping)
        self.read = flat @ self.A
        root = power(eigh(G, "G"), 0.5, damping)
        self.whitened = root @ self.read
        self.total = (self.whitened * (root @ flat)).sum() / 2

    def _factor(self, basis: Tensor) -> Tensor:
        gram = basis.T @ self.A @ basis
        scale, eye = gram.detach().diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny ** 0.5), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        for ridge in (RIDGE, 1e-7, 1e-5):  # moments in float32 may be indefinite by more than the first
            factor, info = torch.linalg.cholesky_ex(gram + ridge * scale * eye)
            if not info.any():
                return factor
        return torch.linalg.cholesky(gram + 1e-3 * scale * eye)

    def explained(self, right: Tensor, kernel: Tensor) -> Tensor:
        """G^(1/2) N T^-T [o, R]: the squares of column r are twice the loss that product r explains beyond those before it."""
        basis = products(right, kernel)
        return torch.linalg.solve_triangular(self._factor(basis), (self.whitened @ basis).T, upper=False).T

    def loss(self, right: Tensor, kernel: Tensor) -> Tensor:
        """The loss with the best output vectors, as a fraction of that of removing the layer."""
        return 1 - self.explained(right, kernel).square().sum() / (2 * self.total)

    def outputs(self, right: Tensor, kernel: Tensor) -> Tensor:
        """L [o, R]."""
        basis = products(right, kernel)
        return torch.cholesky_solve((self.read @ basis).T, self._factor(basis)).T

    def descend(self, right: Tensor, kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Input vectors and kernels after L-BFGS, of unit norm; the best point that was visited."""
        if iterations < 1:
            return right, kernel
        best, least = (right, kernel), torch.inf
        moving = [start.clone(memory_format=torch.contiguous_format).requires_grad_() for start in best]
        optimiser = torch.optim.LBFGS(moving, max_iter=iterations, max_eval=2 * iterations, history_size=20, line_search_fn="strong_wolfe",
                                      tolerance_change=1e-12)

        def closure() -> float:
            nonlocal best, least
            units = [_unit(mode) for mode in moving]
            value = self.loss(*units)
            for mode, gradient in zip(moving, torch.autograd.grad(value, moving), strict=True):
                mode.grad = gradient
            if value.item() < least:
                best, least = tuple(mode.detach() for mode in units), value.item()
            return value.item()

        with contextlib.suppress(torch.linalg.LinAlgError):  # a step that made the products dependent: the best point so far stands
            optimiser.step(closure)
        return best


def products(right: Tensor, kernel: Tensor) -> Tensor:
    """B [c kk, R] of right [c, R] and kernel [kk, R]."""
    return torch.einsum("cr,mr->cmr", right, kernel).flatten(0, 1)


def _unit(mode: Tensor) -> Tensor:
    """Columns of unit norm."""
    return mode / torch.linalg.vector_norm(mode, dim=0).clamp_min(torch.finfo(mode.dtype).tiny)
