"""The second moments of one layer, and what follows from them.

Symbols: A [d, d] second moment of the input windows, in the order (c, kh, kw) and with a last row and column for the bias ("patches"), or
over channels; G [o, o] of the output gradients. With several groups both carry a leading dimension [groups, ...]. Scaling as in KFC
(Grosse and Martens 2016), per image and not per batch, so that layers compare:
    A = E_n sum_t a a^T,   G = 1/T E_n sum_t g g^T,   Fisher block ~= G (x) A with weights flattened row by row [o d].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.curvature.linalg import Spectrum, eigh, kron


@dataclass
class LayerFactors:
    """Statistics of one layer, float64; shapes in the module docstring.

    Attributes
    ----------
    n: images. positions: windows per image (averaged; over all calls of a shared layer). bias: whether A has a row for the bias.
    patch: "full", "channel" or "pixel". kernel: (kh, kw). input_shape: one image's input shape at the last call.
    second: EKFAC second moments of the gradient in the eigenbasis of `eigen()`, [o, d], or [o, c, kh kw] for a channel-only A over a larger
        kernel; None until measured.
    """

    name: str
    A: Tensor
    G: Tensor
    n: int
    positions: float
    bias: bool
    groups: int
    kernel: tuple[int, int]
    patch: str
    input_shape: tuple[int, ...]
    second: Tensor | None = None
    _eigen: tuple[Spectrum, Spectrum] | None = field(default=None, repr=False)

    def eigen(self) -> tuple[Spectrum, Spectrum]:
        """Spectra of A and of G, computed once. Raises RunError where they hold NaN."""
        if self._eigen is None:
            self._eigen = eigh(self.A, f"input moment of layer {self.name!r}"), eigh(self.G, f"gradient moment of layer {self.name!r}")
        return self._eigen

    @property
    def weight_A(self) -> Tensor:
        """A without the bias row and column."""
        return self.A[..., :-1, :-1] if self.bias else self.A

    def block(self, corrected: bool = False) -> Tensor:
        """The dense Fisher block [o d, o d] of one group's weights (for tests and small layers), by K-FAC or, `corrected`, by EKFAC.

        A channel-only moment over a larger kernel is expanded to A (x) I in the order (c, kh, kw).
        """
        offsets = self.kernel[0] * self.kernel[1] if self.patch != "full" else 1
        eye = torch.eye(offsets, dtype=self.A.dtype, device=self.A.device)
        if not corrected:
            return kron(self.G, kron(self.A, eye))
        spectrum_a, spectrum_g = self.eigen()
        basis = kron(spectrum_g.vectors, kron(spectrum_a.vectors, eye))
        return (basis * self.second.flatten()) @ basis.T

    def scale(self) -> float:
        """kappa = E ||grad_n W||^2 / (kk tr G tr A): the factor by which K-FAC misjudges this layer's curvature; needs `second`, else 1."""
        if self.second is None:
            return 1.0
        offsets = self.kernel[0] * self.kernel[1] if self.patch != "full" else 1
        traces = [moment.diagonal(dim1=-2, dim2=-1).sum(-1) for moment in (self.A, self.G)]
        product = float((traces[0] * traces[1]).sum()) * offsets
        return float(self.second.sum()) / product if product > 0 else 1.0
