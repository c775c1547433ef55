"""Starting again under a mask: rewinding, training from scratch, and the ablations that tell a good mask from good weights.

* `rewind`: the surviving weights go back to an earlier state of the same network (lottery ticket, Frankle & Carbin 2019,
  arXiv:1803.03635; iterative: prune, rewind, train, repeat). All parameters are rewound, and buffers too unless told otherwise.
* `scratch`: new weights, the surviving ones of each layer ~ N(0, 2 c_in / k) with k kept weights: He initialisation for the fan-out that
  survives (Liu et al. 2019, arXiv:1810.05270). Scratch-E trains as many epochs as before, Scratch-B (`scratch_b_epochs`) as much as
  the dense network cost.
* `reinitialize`: the initial values of another draw, the same mask. `shuffle`: the same layer densities at random places
  (Frankle et al. 2021, arXiv:2009.08576). Inverted scores are an option of `prune`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.masks.buffers import SUFFIX, Masks


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers but the masks, for `rewind`."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if not name.endswith(SUFFIX)}


@torch.no_grad()
def rewind(masks: Masks, state: Mapping[str, Tensor], buffers: bool = True) -> None:
    """Put parameters (and `buffers`: BatchNorm statistics) back to `state`; the masks stay and are applied."""
    own = dict(masks.model.named_parameters())
    if buffers:
        own |= {name: value for name, value in masks.model.named_buffers() if not name.endswith(SUFFIX)}
    for name, value in own.items():
        if name not in state or state[name].shape != value.shape:
            raise UserError(f"The state to rewind to does not fit {type(masks.model).__name__}: {name!r} is missing or has another shape.")
    for name, value in own.items():
        value.copy_(state[name])
    masks.apply()


def reinitialize(masks: Masks, fresh: nn.Module) -> None:
    """Take over all values of `fresh`, a newly built network of the same architecture; the masks stay."""
    rewind(masks, snapshot(fresh))


@torch.no_grad()
def scratch(masks: Masks, fresh: nn.Module, generator: torch.Generator) -> None:
    """As `reinitialize`, and the masked convolutions and linear layers drawn from N(0, 2 c_in / kept)."""
    reinitialize(masks, fresh)
    for name, mask in masks.items():
        kept = int(mask.sum())
        if mask.dim() > 1 and kept:
            parameter = masks.parameter(name)
            draw = torch.randn(mask.shape, generator=generator, dtype=parameter.dtype, device=generator.device).to(parameter.device)
            parameter.copy_(draw * math.sqrt(2 * mask.shape[1] / kept))
    masks.apply()


def scratch_b_epochs(epochs: int, macs: float, macs_nonzero: float) -> int:
    """Epochs that spend on the masked network what `epochs` spent on the dense one, rounded; never fewer."""
    if not 0 < macs_nonzero <= macs:
        raise UserError(f"Scratch-B needs 0 < MACs of the masked network <= MACs of the dense one, got {macs_nonzero!r} and {macs!r}.")
    return max(epochs, round(epochs * macs / macs_nonzero))


def shuffle(masks: Masks, generator: torch.Generator) -> None:
    """Move every mask's kept places at random within its tensor. Values at new places are zero until the network is rewound or trained."""
    new = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator, device=generator.device).to(mask.device)
        new[name] = mask.flatten()[order].reshape(mask.shape)
    masks.replace(new)
