"""Magnitude pruning: S = |theta| (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compress.saliency import weight_criterion
from compress.saliency.statistics import parameters


@weight_criterion("magnitude")
def magnitude(model: nn.Module, names: Sequence[str], **_: object) -> dict[str, Tensor]:
    """Absolute values of the weights."""
    return {name: parameter.detach().abs() for name, parameter in zip(names, parameters(model, names), strict=True)}
