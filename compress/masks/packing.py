"""Masked parameters in a state dictionary as packed masks and kept values, and back.

A parameter `name` of n weights with its mask buffer `name_mask` becomes `name.mask` (uint8, ceil(n / 8) bytes, one bit per weight) and
`name.kept` (the kept values in order): smaller than dense wherever more than 1 weight in 32 is pruned. No parameter is called so, since
a parameter has nothing below it. Pruned weights are zero and come back as +0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.masks.buffers import SUFFIX


def pack_mask(mask: Tensor) -> Tensor:
    """One bit per entry, uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(bits: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The mask of this shape whose bits `pack_mask` gave."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=int(np.prod(shape))).astype(bool)).reshape(tuple(shape))


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` (on the CPU) with its masked parameters packed; one that holds anything but zeros where it is pruned stays as it is."""
    result = dict(state)
    for name, weight in state.items():
        mask = state.get(name + SUFFIX)
        if mask is None or mask.dtype != torch.bool or mask.shape != weight.shape or bool((weight[~mask] != 0).any()):
            continue
        del result[name], result[name + SUFFIX]
        result |= {f"{name}.mask": pack_mask(mask), f"{name}.kept": weight[mask]}
    return result


def unpacked(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> dict[str, Tensor]:
    """What `packed` was given, for parameters of these shapes; `UserError` naming `source` where the sizes do not fit."""
    result = dict(state)
    for name, shape in shapes.items():
        if name + SUFFIX not in shapes or not {f"{name}.mask", f"{name}.kept"} <= result.keys():
            continue
        bits, values = result.pop(f"{name}.mask"), result.pop(f"{name}.kept")
        fits = bits.dtype == torch.uint8 and bits.shape == (-(-shape.numel() // 8),)
        mask = unpack_mask(bits, shape) if fits else torch.zeros(0, dtype=torch.bool)
        if not fits or values.shape != (int(mask.sum()),):
            raise UserError(f"{source}: the mask of {name!r} does not belong to a tensor of shape {list(shape)} with {len(values)} kept weights.")
        result[name] = torch.zeros(shape, dtype=values.dtype)
        result[name][mask] = values
        result[name + SUFFIX] = mask
    return result
