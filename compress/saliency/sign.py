"""Pruning one sign only: the smallest positive weights first, or the negative weights closest to zero first.

These are two players of the pruning game (`compress.nim`). Weights of the other sign, and zeros, are protected (+inf), so that a
density below the share of the other sign cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.saliency import weight_criterion
from compress.saliency.statistics import parameters


@weight_criterion("positive")
def positive(model: nn.Module, names: Sequence[str], **_: object) -> dict[str, Tensor]:
    """theta where theta > 0, else +inf."""
    found = zip(names, parameters(model, names), strict=True)
    return {name: weight.detach().masked_fill(weight.detach() <= 0, torch.inf) for name, weight in found}


@weight_criterion("negative")
def negative(model: nn.Module, names: Sequence[str], **_: object) -> dict[str, Tensor]:
    """-theta where theta < 0, else +inf."""
    found = zip(names, parameters(model, names), strict=True)
    return {name: (-weight.detach()).masked_fill(weight.detach() >= 0, torch.inf) for name, weight in found}
