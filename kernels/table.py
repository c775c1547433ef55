"""The table of measurements: a JSON file {key: {alternative: microseconds}} in the cache folder.

A key names everything a time depends on: device, versions, threads, operator, shapes, data type, density and pattern of the mask.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path

import torch

from . import cache

FILE = "kernels.json"


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
