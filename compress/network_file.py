"""A compressed network on disk: safetensors for the weights, JSON for everything else, never pickle.

A folder holds `model.safetensors` (parameters and buffers), `plan.json` (what was done to which layer) and `model.json` (how the
uncompressed network is built, or that the user builds it). `load` builds the uncompressed network, replays the plan and
reads the weights; it runs no code from the folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from compress.arguments import unusable
from compress.errors import UserError
from compress.files import read_json, write_bytes, write_json, write_text
from compress.masks.packing import packed, unpacked
from compress.plan import Plan, apply_plan
from compress.siblings import own

WEIGHTS, PLAN, NETWORK = "model.safetensors", "plan.json", "model.json"
FORMAT = 1


def weights_to_bytes(model: nn.Module) -> bytes:
    """All parameters and persistent buffers as safetensors; a tensor with several names (a tie) is stored once per name, a masked one as
    its mask's bits and its kept values (`compress.masks.packing`)."""
    held = model.state_dict()
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise UserError(f"The network keeps {name!r} in its state_dict, which is no tensor ({type(value).__name__}) and cannot be stored.")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in held.items()}
    return to_bytes(packed(state), metadata={"format": "pt"})


def read_weights(model: nn.Module, content: bytes, source: str) -> None:
    """Copy the tensors of a safetensors file into `model`; names and shapes must agree exactly, data types are taken from the file.

    Parameters
    ----------
    source:
        What the bytes are, for the error messages.
    """
    try:
        state = from_bytes(content)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise UserError(f"{source} is not a complete safetensors file ({error}); copy or create it again.") from None
    own_state = model.state_dict()
    state = unpacked(state, {name: value.shape for name, value in own_state.items()}, source)
    for kind, names in (("lacks", own_state.keys() - state.keys()), ("holds the unknown", state.keys() - own_state.keys())):
        if names:
            raise UserError(f"{source} {kind} tensor {min(names)!r} ({len(names)} such); it belongs to another network.")
    for name, tensor in own_state.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{source}: tensor {name!r} has shape {list(state[name].shape)}, the network needs {list(tensor.shape)}.")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in state and tensor.dtype != state[name].dtype:
                tensor.data = tensor.data.to(state[name].dtype)
        model.load_state_dict(state)


def _folder(folder: Any) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise UserError(f"A network is kept in a folder, and {folder!r} is no path.") from None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from None


def save(model: nn.Module, plan: Plan, folder: str | Path, **info: Any) -> None:
    """Write `model` and the `plan` that led to it into `folder` (created where missing).

    Parameters
    ----------
    model:
        The compressed network. One built by `models.build` can be loaded without giving a network again.
    info:
        JSON values that are kept in `model.json` beside the toolkit's own entries.
    """
    folder = _folder(folder)
    if not isinstance(model, nn.Module) or not isinstance(plan, Plan):
        raise UserError(f"save takes a network and the plan that led to it, and got a {type(model).__name__} and a {type(plan).__name__}.")
    if reason := unusable(model):
        raise UserError(reason)
    for name, value in info.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{name}={value!r} cannot be kept beside the network, since it is not JSON ({error}).") from None
    content = weights_to_bytes(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made: {error.strerror}.") from None
    write_text(folder / PLAN, plan.to_json() + "\n")
    write_bytes(folder / WEIGHTS, content)
    network = {
        "format": FORMAT,
        "build": getattr(model, "build_spec", None),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        **info,
    }
    write_json(folder / NETWORK, network)  # last: a folder with this file is complete


def read(folder: str | Path) -> tuple[dict[str, Any], Plan, bytes]:
    """What `save` wrote: the description, the plan and the bytes of the weights; UserError where one is missing or damaged."""
    folder = _folder(folder)
    network = read_json(folder / NETWORK, "network description")
    if not isinstance(network, dict) or network.get("format") != FORMAT:
        raise UserError(f"{folder / NETWORK} is not a network description of format {FORMAT}; it was written by another version or program.")
    plan = Plan.from_json(_read(folder / PLAN, "plan").decode("utf-8", "replace"))
    content = _read(folder / WEIGHTS, "weights")
    if hashlib.sha256(content).hexdigest() != network.get("sha256"):
        raise UserError(f"The weights {folder / WEIGHTS} are not the ones that {NETWORK} describes (checksum differs); copy the folder again.")
    return network, plan, content


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network that `save` wrote; the result is in evaluation mode, on the CPU.

    Parameters
    ----------
    model:
        The freshly built, uncompressed network, for networks that are not of this toolkit's registry. It is changed in place.

    Raises
    ------
    UserError
        For a missing, damaged or foreign folder, and for a network that the plan does not fit.
    """
    folder = _folder(folder)
    network, plan, content = read(folder)
    if model is not None and not isinstance(model, nn.Module):
        raise UserError(f"load(folder, model) takes a freshly built network, and got a {type(model).__name__}.")
    if model is None:
        spec = network.get("build")
        if not isinstance(spec, dict):
            raise UserError(f"{folder} holds a network of class {network.get('class')} that is not in the registry; call load(folder, model) with a freshly built one.")
        try:
            model = own("models").build(**spec)
        except (TypeError, AttributeError) as error:
            raise UserError(f'The "build" entry of {folder / NETWORK} does not describe a network of the registry ({error}).') from None
    if reason := unusable(model):
        raise UserError(reason)
    apply_plan(model, plan)
    read_weights(model, content, str(folder / WEIGHTS))
    _set_frozen(model, network, folder / NETWORK)
    return model.eval()


def _set_frozen(model: nn.Module, network: dict[str, Any], source: Path) -> None:
    """Which parameters are trained, as when the network was stored; networks stored without this entry keep what the fresh one has."""
    if "frozen" not in network:
        return
    parameters, frozen = dict(model.named_parameters()), network["frozen"]
    for name in frozen if isinstance(frozen, list) else [frozen]:
        if not isinstance(name, str) or name not in parameters:
            raise UserError(f'The "frozen" entry of {source} holds {name!r}, which is no parameter of the network; copy or create the folder again.')
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
