"""Masked networks on disk: one safetensors file with bit-packed masks and the kept values only.

For each masked parameter `name` of n weights, k of them kept: `name.mask` (uint8, ceil(n/8) bytes) and `name.kept` (k values); every other
parameter and buffer as it is. A parameter of 32-bit values is smaller than dense when more than 1 weight in 32 is pruned; a mask that keeps
everything is stored as the parameter alone. The metadata holds the format version, the scope and the shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import UserError
from compress.masks.buffers import SUFFIX, Masks
from compress.masks.packing import pack_mask, unpack_mask

_FORMAT = "masked-1"


def save_masked(masks: Masks, path: Path | str) -> None:
    """Write the network under `masks`, the masks and their scope. The file appears complete or not at all."""
    path = Path(path)
    tensors, shapes = {}, {}
    state, seen = masks.model.state_dict(), set()
    for name in masks.names:
        mask, weight = masks[name], masks.parameter(name).detach()
        shapes[name] = list(weight.shape)
        if bool(mask.all()):
            tensors[name] = weight.contiguous().cpu()
        else:
            tensors[f"{name}.mask"] = pack_mask(mask)
            tensors[f"{name}.kept"] = weight[mask].cpu()
        seen |= {name, name + SUFFIX}
    # Tied parameters appear twice in a state dictionary; safetensors refuses shared memory, so each is written by itself.
    tensors |= {name: value.detach().contiguous().cpu().clone() for name, value in state.items() if name not in seen}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": _FORMAT, "scope": masks.scope or "", "shapes": json.dumps(shapes)})
    part.replace(path)


def load_masked(model: nn.Module, path: Path | str) -> Masks:
    """Fill `model` (freshly built, without masks or with the same ones) and attach the masks; all or nothing.

    Raises `UserError` for a missing, truncated or foreign file and for names or shapes that do not fit, naming the first one.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"The masked network {str(path)!r} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"The masked network {str(path)!r} cannot be read as safetensors ({error}); copy or save it again.") from None
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{str(path)!r} is no masked network of this toolkit; plain weights are loaded with load_weights.")
    shapes = json.loads(metadata["shapes"])
    new, found = {}, {}
    for name, shape in shapes.items():
        if name in tensors:
            found[name] = torch.ones(shape, dtype=torch.bool)
            continue
        found[name] = unpack_mask(tensors.pop(f"{name}.mask"), shape)
        values = tensors.pop(f"{name}.kept")
        new[name] = torch.zeros(shape, dtype=values.dtype)
        new[name][found[name]] = values
    new |= tensors
    own = {name: value for name, value in model.state_dict().items() if not (name.endswith(SUFFIX) and value.dtype == torch.bool)}
    for name, value in own.items():
        if name not in new or new[name].shape != value.shape:
            held = "nothing" if name not in new else f"shape {tuple(new[name].shape)}"
            raise UserError(
                f"{str(path)!r} does not fit {type(model).__name__}: for {name!r} of shape {tuple(value.shape)} it holds {held}."
            )
    extra = sorted(set(new) - set(own))
    if extra:
        raise UserError(f"{str(path)!r} does not fit {type(model).__name__}: it holds {extra[0]!r}, which the network lacks.")
    model.load_state_dict(new, strict=False)
    device = next(iter(own.values())).device
    for name, mask in found.items():
        layer, _, short = name.rpartition(".")
        model.get_submodule(layer).register_buffer(short + SUFFIX, mask.to(device))
    return Masks(model, list(found), metadata.get("scope") or None)
