"""Starts a module of this folder in a process of its own and reads the JSON lines that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def started(module: str, *arguments: str, interpret: bool, cache: Path, timeout: float = 3000) -> subprocess.CompletedProcess:
    """`python -m tests.kernels.<module>`, ended; TRITON_INTERPRET is set or removed, compiled kernels go to `cache`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def json_lines(module: str, *arguments: str, **settings) -> list[dict]:
    """The JSON lines that `started` with the same arguments printed."""
    done = started(module, *arguments, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
