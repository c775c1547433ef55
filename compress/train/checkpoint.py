"""Checkpoint files: tensors and a JSON state in one safetensors file, complete or not there at all, two generations.

A file is written under a temporary name, fsynced, renamed, and the folder is fsynced, so that a kill or a power cut at any moment leaves
either generation whole. The header carries the SHA-256 of the tensors, so that a changed bit is found and the generation before it is used.
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from compress.errors import RunError, UserError
from compress.files import write_bytes

_FORMAT = 1


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def encode(tensors: dict[str, Tensor], state: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint; `state` must be JSON."""
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(held, {"format": str(_FORMAT), "digest": digest(held), "state": json.dumps(state)})


def decode(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint's bytes; raises `ValueError` with the reason where they are not whole."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + size:
        raise ValueError("it is truncated")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header["__metadata__"]
        version, expected, state = int(metadata["format"]), metadata["digest"], json.loads(metadata["state"])
        tensors = safetensors.torch.load(data)
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError("it is truncated or no checkpoint") from error
    if version != _FORMAT:
        raise ValueError(f"it has format {version} and this version reads format {_FORMAT}")
    if digest(tensors) != expected:
        raise ValueError("its contents do not match its checksum")
    return tensors, state


class Checkpoints:
    """The two generations at `path` and `<stem>.previous<suffix>` beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self._current_is_whole = False

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a new generation; the one before stays. A current file that was found broken never replaces the one before it."""
        data = encode(tensors, state)
        if self._current_is_whole:
            try:
                os.replace(self.path, self.previous)
            except OSError as error:
                raise RunError(f"The file {self.path} could not be renamed: {error.strerror or error}.") from error
        self._current_is_whole = False
        try:
            write_bytes(self.path, data)
        except OSError as error:
            raise RunError(f"The file {self.path} could not be written: {error.strerror or error}.") from error
        self._current_is_whole = True

    def load(self) -> tuple[bytes, str | None] | None:
        """The bytes of the newest whole generation and why a newer one was passed over; `None` where there is no file.

        Raises `UserError` where there are files, but none of them is whole.
        """
        reasons = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                data = path.read_bytes()
                decode(data)
            except (OSError, ValueError) as error:
                reasons.append(f"{path}: {error}")
                continue
            self._current_is_whole = path == self.path
            return data, reasons[0] if reasons else None
        if reasons:
            raise UserError(f"No checkpoint can be read ({'; '.join(reasons)}); delete the files to train from the start.")
        return None

    def remove(self) -> None:
        """Delete both generations."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)
        self._current_is_whole = False


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `<parameter number>.<key>`; groups are not kept, they follow from the configuration."""
    packed = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if value is not None:
                packed[f"{number}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Put a packed state into an optimiser built for the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in packed.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
