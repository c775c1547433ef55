"""How far the outputs of a changed network are from those of the original: the scale on which the allocation "measured" compares layers.

Symbols: p the softmax of the original outputs over dimension 1, q that of the changed network,
    D = mean over images (and positions) of KL(p || q) = sum_c p_c (log p_c - log q_c).
BatchNorm layers of both normalise with the batch's own statistics, as they will after recalibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import RunError, UserError
from compress.undisturbed import arguments, undisturbed

IMAGES = 256


class Outputs:
    """The outputs of a network on the first `images` calibration images, `batches` being pairs (inputs, targets); targets are not used.

    Raises
    ------
    UserError: no images, or outputs that are no float tensor of logits [n, classes, ...]. RunError: outputs that are not finite.
    """

    def __init__(self, model: nn.Module, batches: Iterable[tuple[Any, Any]], images: int = IMAGES) -> None:
        self.inputs = _first(batches, images)
        self.reference = _log_probabilities(model, self.inputs)
        if not all(torch.isfinite(outputs).all() for outputs in self.reference):
            raise RunError("The network gives NaN or infinity on the calibration images, with which nothing can be compared; check the images.")

    def divergence(self, changed: nn.Module) -> float:
        """D of the changed network; infinite or NaN where it was destroyed."""
        outputs = _log_probabilities(changed, self.inputs)
        total = sum(float(F.kl_div(q, p, log_target=True, reduction="sum").double()) for p, q in zip(self.reference, outputs, strict=True))
        return total / sum(p.numel() // p.shape[1] for p in self.reference)


def _first(batches: Iterable[tuple[Any, Any]], images: int) -> list[tuple]:
    chosen, seen = [], 0
    for inputs, targets in batches:
        if seen >= images:
            break
        chosen.append(tuple(part[: images - seen] for part in arguments(inputs)))
        seen += len(chosen[-1][0])
    if not seen:
        raise UserError("Allocation 'measured' needs calibration images to compare outputs on, and got none.")
    return chosen


def _log_probabilities(model: nn.Module, inputs: list[tuple]) -> list[Tensor]:
    """log softmax of the outputs of every batch, BatchNorm normalising with the batch where it has more than one image."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    results = []
    with torch.no_grad(), undisturbed(model):
        for parts in inputs:
            for norm in norms:
                norm.training = len(parts[0]) > 1
            outputs = model(*parts)
            if not isinstance(outputs, Tensor) or outputs.ndim < 2 or not outputs.is_floating_point():
                raise UserError("Allocation 'measured' compares class logits, a float tensor [n, classes, ...], and the network returns "
                                f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}; choose 'global' or 'uniform'.")
            results.append(F.log_softmax(outputs.float(), 1))
    return results
