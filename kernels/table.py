"""The table of measurements: a JSON file {key: {alternative: microseconds, or null where it is hopelessly slow}} in the cache folder.

A key names everything a time depends on: device, versions (of this package's sources too), threads, operator, shapes, data type, TF32,
autocast, cuDNN's search, density and pattern of the mask. It says nothing about the weights' values, so a form that failed on some
(NaN, an exception) has no place in the table.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from . import cache, precision
from .sparse_conv.reference import channels_last
from .vector_block.reference import kept_columns
from .version import version

FILE = "kernels.json"
GROUP = 16  # input channels of one entry of a sparse convolution
RUN = 16  # kept weights of one run


def default_path() -> Path:
    """`kernels.json` in the cache folder (environment variable COMPRESS_CACHE, otherwise the platform's)."""
    return cache.folder() / FILE


def device_name(device: torch.device) -> str:
    """What a measurement on `device` is valid for: processor, threads, library versions."""
    versions = f"torch {torch.__version__}"
    if device.type == "cuda":
        if importlib.util.find_spec("triton"):
            import triton

            versions += f" triton {triton.__version__}"
        return f"{torch.cuda.get_device_name(device)} {versions}"
    return f"{_cpu_name()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads {versions}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def layer_key(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], last: bool, density: float) -> str:
    """The key of a layer's times on inputs of `shape` (channels_last if `last`)."""
    weight = layer.weight
    mask = (weight != 0).flatten(1)
    geometry = f"linear {tuple(weight.shape)}"
    pattern = f"vectors of 64 {kept_columns(mask, 64):.2f} of 128 {kept_columns(mask, 128):.2f} skew {_skew(mask):.1f}"
    if isinstance(layer, nn.Conv2d):
        geometry = f"conv {tuple(weight.shape)} {layer.stride} {layer.padding} {layer.dilation}"
        if layer.in_channels % GROUP == 0:
            pattern += f" panels 64x{GROUP} {kept_columns(channels_last(mask, layer.kernel_size), 64, GROUP):.2f}"
    on = f"{device_name(weight.device)} kernels {version()} | {geometry} on {shape}{' channels_last' if last else ''}"
    state = settings(weight.device, weight.dtype, isinstance(layer, nn.Conv2d))
    return f"{on} | {state} | density {density:.2f} | {pattern}"


def settings(device: torch.device, dtype: torch.dtype, convolution: bool) -> str:
    """The data type of a layer's weight and those of torch's switches that decide how `device` multiplies it now."""
    found = [str(dtype)]
    if device.type == "cuda" and dtype == torch.float32:
        tf32 = {"products": precision.products_in_tf32(), "convolutions": precision.convolutions_in_tf32()}
        found.append("TF32 " + (" and ".join(name for name, on in tf32.items() if on) or "off"))
    if device.type == "cuda" and convolution:
        found += [f"cudnn {name}" for name in ("enabled", "benchmark", "deterministic") if getattr(torch.backends.cudnn, name)]
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        found.append(f"autocast {torch.get_autocast_dtype(device.type)}")
    return " ".join(found)


def _skew(mask: Tensor) -> float:
    """Runs of the longest row over the mean: how unevenly the work is spread."""
    runs = -(-mask.sum(1) // RUN)
    return float(runs.max() / runs.float().mean().clamp(min=1e-9)) if runs.numel() else 1.0


def _times(row: object) -> dict[str, float] | None:
    """A row of the file as microseconds (inf for null); None where it holds anything else, or no time of the dense layer."""
    if not isinstance(row, dict) or row.get("dense") is None:
        return None
    given = [t for t in row.values() if t is not None]
    if not all(type(t) in (int, float) and 0 < t <= sys.float_info.max for t in given):
        return None
    return {label: math.inf if t is None else float(t) for label, t in row.items()}


class Table:
    """Reads once, writes after every new measurement; an unreadable file counts as empty, rows that make no sense as missing, and an
    unwritable file is not written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = {} if path is None else self._read(path)

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError):
            return {}
        rows = {key: _times(row) for key, row in found.items()} if isinstance(found, dict) else {}
        return {key: times for key, times in rows.items() if times is not None}

    def get(self, key: str, alternatives: list[str]) -> dict[str, float] | None:
        """The measurement under `key` if it covers all `alternatives`; inf for those that are hopelessly slow."""
        row = self.rows.get(key)
        return row if row is not None and set(alternatives) <= set(row) else None

    def put(self, key: str, times: dict[str, float]) -> None:
        """Adds a measurement (inf: hopelessly slow), keeping what another process wrote meanwhile."""
        self.rows[key] = times
        if self.path is None:
            return
        merged = {**self._read(self.path), key: times}
        rows = {key: {label: t if t < math.inf else None for label, t in row.items()} for key, row in merged.items()}
        try:
            cache.write_atomically(self.path, json.dumps(rows, indent=1, sort_keys=True, allow_nan=False).encode())
        except OSError:
            self.path = None
