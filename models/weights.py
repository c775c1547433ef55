"""Fills a network from a safetensors file; the file is checked completely before the first value changes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.errors import UserError
from compress.registry import nearest


def find_weights(path: str | Path) -> Path:
    """The file that `path` names: as given, or, if relative and not there, inside the folder named by COMPRESS_WEIGHTS.

    Raises
    ------
    UserError
        If there is no such file.
    """
    path = Path(path)
    folder = os.environ.get("COMPRESS_WEIGHTS")
    places = [path] if path.is_absolute() or not folder else [path, Path(folder) / path]
    for place in places:
        if place.is_file():
            return place
    also = f" nor in COMPRESS_WEIGHTS ({folder})" if len(places) > 1 else ""
    kind = "is a folder, not a safetensors file" if path.is_dir() else f"was not found{also}"
    raise UserError(f"Weights file {path} {kind}.")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"Weights file {path} is no complete safetensors file ({str(error).strip() or type(error).__name__}); "
            "expected one written by safetensors, not a pickle, and not cut off."
        ) from error


def _optional(target: dict[str, Tensor], given: dict[str, Tensor]) -> set[str]:
    """Names that a file may omit: batch counters, which evaluation does not read, and second names of a tensor that it does give."""
    present = {id(target[name]) for name in given if name in target}
    return {name for name, tensor in target.items() if name.endswith("num_batches_tracked") or id(tensor) in present}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copies the tensors of a safetensors file into `model` in place, all of them or none.

    Names and shapes must be those of `model.state_dict()`; only BatchNorm's `num_batches_tracked`, and further names of shared tensors,
    may be absent. Values are converted to the model's data type and device. `path` is looked up as in `find_weights`.

    Raises
    ------
    UserError
        One sentence with the first offending name: no such file, unreadable file, missing or unexpected name, wrong shape, wrong kind of
        number, or a value that is not finite.
    """
    path = find_weights(path)
    given = _read(path)
    target = model.state_dict(keep_vars=True)
    optional = _optional(target, given)
    unknown = [name for name in given if name not in target]
    for name in target:
        if name not in given and name not in optional:
            raise UserError(f"Weights file {path} has no tensor {name!r}{nearest(name, unknown)}; the network needs it.")
    if unknown:
        raise UserError(f"Weights file {path} holds {unknown[0]!r}, which the network does not have.")
    for name, tensor in given.items():
        want = target[name]
        if tensor.shape != want.shape:
            raise UserError(f"Tensor {name!r} in weights file {path} has shape {list(tensor.shape)}; the network needs {list(want.shape)}.")
        if tensor.is_floating_point() != want.is_floating_point() or tensor.is_complex() != want.is_complex():
            raise UserError(f"Tensor {name!r} in weights file {path} is {tensor.dtype}; the network needs {want.dtype}.")
        # Checked after the conversion: a large float32 value overflows in a float16 network.
        if not torch.isfinite(tensor.to(want.dtype)).all():
            raise UserError(f"Tensor {name!r} in weights file {path} holds values that are not finite as {want.dtype}.")
    with torch.no_grad():
        for name, tensor in given.items():
            target[name].copy_(tensor)
