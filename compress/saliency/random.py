"""Random pruning: S ~ U[0, 1), drawn on the CPU so that every device gives the same masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.saliency import weight_criterion
from compress.saliency.statistics import parameters


@weight_criterion("random")
def random(model: nn.Module, names: Sequence[str], *, generator: torch.Generator | None = None, **_: object) -> dict[str, Tensor]:
    """Independent uniform scores; `generator` is required."""
    if generator is None:
        raise UserError("Weight criterion 'random' draws numbers and got no generator; give a torch.Generator.")
    return {
        name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device=generator.device).to(parameter.device)
        for name, parameter in zip(names, parameters(model, names), strict=True)
    }
