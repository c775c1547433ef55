"""The table of measurements: a JSON file {key: {alternative: microseconds}} in the cache folder.

A key names everything a time depends on: device, versions, threads, operator, shapes, data type, TF32, density and pattern of the mask.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from . import cache, precision
from .sparse_conv.reference import channels_last
from .vector_block.reference import kept_columns

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
    kind = str(weight.dtype)
    if weight.is_cuda and weight.dtype == torch.float32:
        tf32 = {"products": precision.products_in_tf32(), "convolutions": precision.convolutions_in_tf32()}
        kind += " TF32 " + (" and ".join(name for name, on in tf32.items() if on) or "off")
    on = f"{device_name(weight.device)} | {geometry} on {shape}{' channels_last' if last else ''}"
    return f"{on} | {kind} | density {density:.2f} | {pattern}"


def _skew(mask: Tensor) -> float:
    """Runs of the longest row over the mean: how unevenly the work is spread."""
    runs = -(-mask.sum(1) // RUN)
    return float(runs.max() / runs.float().mean().clamp(min=1e-9)) if runs.numel() else 1.0


class Table:
    """Reads once, writes after every new measurement; an unreadable file counts as empty, an unwritable one is not written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, float]] = {}
        if path is not None and path.is_file():
            self.rows = self._read(path)

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {k: {a: float(t) for a, t in v.items()} for k, v in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def get(self, key: str, alternatives: list[str]) -> dict[str, float] | None:
        """The measurement under `key` if it covers all `alternatives`."""
        row = self.rows.get(key)
        return row if row is not None and set(alternatives) <= set(row) else None

    def put(self, key: str, times: dict[str, float]) -> None:
        """Adds a measurement, keeping what another process wrote meanwhile."""
        self.rows[key] = times
        if self.path is None:
            return
        merged = {**(self._read(self.path) if self.path.is_file() else {}), key: times}
        try:
            cache.write_atomically(self.path, json.dumps(merged, indent=1, sort_keys=True).encode())
        except OSError:
            self.path = None
