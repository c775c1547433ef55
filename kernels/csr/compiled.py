"""Builds cpu.c with the machine's C compiler on first use and calls it through ctypes.

The library lies in the cache folder under a name that hashes the source, the flags, the compiler and the processor. Without a
compiler, or if a small product comes out wrong, `library()` is None and the callers use MKL or scipy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .. import cache
from . import reference

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
SOURCE = Path(__file__).with_name("cpu.c")
SLACK = 16
ON_CHIP = 1024 * 1024
WIDEST = 128
# cpu.c addresses the dense operand of one product by 32-bit offsets.
REACH = 2**31 - 1
INT, LONG, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(compiler: str, target: Path) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "cpu.so"
        wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
        for extra in ((*wide, "-fopenmp"), ("-fopenmp",), ()):
            command = [compiler, *FLAGS, *extra, "-o", str(built), str(SOURCE)]
            if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                cache.write_atomically(target, built.read_bytes())
                return True
    return False


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built or give wrong results."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None or not SOURCE.is_file():
        return None
    key = hashlib.sha256("\n".join((SOURCE.read_text(encoding="utf-8"), *FLAGS, compiler, _processor())).encode()).hexdigest()[:20]
    target = cache.folder() / f"csr-{key}.so"
    try:
        if not target.is_file() and not _compile(compiler, target):
            return None
        loaded = ctypes.CDLL(str(target))
        loaded.csr_images.argtypes = [LONG, LONG, LONG, *[POINTER] * 5, LONG, POINTER, *[LONG] * 4, POINTER, INT, LONG, INT]
        loaded.csr_vector.argtypes = [LONG, *[POINTER] * 6, INT, INT]
        loaded.csr_convolve.argtypes = [LONG, LONG, *[POINTER] * 12, INT, LONG, INT]
        loaded.csr_convolve.restype = None
        loaded.csr_images.restype = loaded.csr_vector.restype = None
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    return loaded if _agrees(loaded) else None


@torch.autocast("cpu", enabled=False)
def _agrees(loaded: ctypes.CDLL) -> bool:
    """Whether small products come out right, whatever the caller's default data type and device."""
    generator, plain = torch.Generator("cpu").manual_seed(0), {"dtype": torch.float32, "device": "cpu"}
    weight = torch.randn(9, 37, generator=generator, **plain) * (torch.rand(9, 37, generator=generator, **plain) < 0.4)
    values, (crow, col) = reference.pack(weight)
    parts = values, crow, col
    x = torch.randn(37, 53, generator=generator, **plain)
    ok = torch.allclose(matrix(loaded, x, *parts, None, False, 1), weight @ x, atol=1e-4)
    return ok and torch.allclose(vector(loaded, x[:, 0].contiguous(), *parts, None, False, 1), weight @ x[:, 0], atol=1e-4)


def _tile(rows: int, overhang: int = 0) -> int:
    """Columns per tile: as many as keep `rows` rows of the dense operand, `overhang` longer than the tile, in the second-level cache."""
    return WIDEST if rows * (WIDEST + overhang) * 4 <= ON_CHIP else WIDEST // 2


def vector(loaded: ctypes.CDLL, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, relu: bool,
           threads: int) -> Tensor:
    """act(W x + bias), [rows], for x [columns]; float32, contiguous, on the CPU."""
    rows = crow.numel() - 1
    y = x.new_empty(rows)
    given = None if bias is None else bias.data_ptr()
    loaded.csr_vector(rows, crow.data_ptr(), col.data_ptr(), values.data_ptr(), x.data_ptr(), y.data_ptr(), given, relu, threads)
    return y


def matrix(loaded: ctypes.CDLL, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, relu: bool,
           threads: int) -> Tensor:
    """act(W x + bias), [(images,) rows, n], for x [(images,) columns, n], float32, contiguous, on the CPU."""
    columns, n = x.shape[-2:]
    if columns * n > REACH and n > 1:
        width = max(1, REACH // columns)
        parts = [x[..., first : first + width].contiguous() for first in range(0, n, width)]
        return torch.cat([matrix(loaded, part, values, crow, col, bias, relu, threads) for part in parts], -1)
    images = x.shape[0] if x.ndim == 3 else 1
    rows = crow.numel() - 1
    if n % SLACK:
        x = _with_slack(x)
    y = x.new_empty(*x.shape[:-2], rows, n)
    place, given = row_places(columns, n), None if bias is None else bias.data_ptr()
    loaded.csr_images(images, rows, n, crow.data_ptr(), col.data_ptr(), values.data_ptr(), place.data_ptr(), x.data_ptr(), columns * n,
                      y.data_ptr(), rows * n, n, n, n, given, relu, _tile(columns), threads)
    return y


def _with_slack(x: Tensor) -> Tensor:
    """A copy of x with readable memory behind its last element."""
    return x.new_zeros(x.numel() + SLACK)[: x.numel()].copy_(x.reshape(-1)).view(x.shape)


def _phase(x: Tensor, stride, padding) -> tuple[int, int]:
    """Lines and columns of one phase of a padded image."""
    return tuple(-(-(size + 2 * pad) // step) for size, pad, step in zip(x.shape[2:], padding, stride))


def reaches(x: Tensor, stride, padding) -> bool:
    """Whether `convolve` can address an image of x."""
    high, wide = _phase(x, stride, padding)
    return x.shape[1] * stride[0] * stride[1] * high * wide <= REACH


def convolve(loaded: ctypes.CDLL, x: Tensor, size: tuple[int, int], kernel, stride, padding, dilation, values: Tensor, crow: Tensor,
             col: Tensor, bias: Tensor | None, relu: bool, threads: int) -> Tensor:
    """act(conv(x, W) + bias), [N, rows, *size], for x [N, c, h, w], float32, contiguous, on the CPU."""
    batch, channels, height, width = x.shape
    rows = crow.numel() - 1
    high, wide = _phase(x, stride, padding)
    place = tap_places(channels, tuple(kernel), tuple(stride), tuple(dilation), high, wide)
    scratch = x.new_empty(channels * stride[0] * stride[1] * high * wide + SLACK)
    y = x.new_empty(batch, rows, *size)
    shape = (LONG * 5)(channels, height, width, high, wide)
    given = None if bias is None else bias.data_ptr()
    width = _tile(channels * stride[0] * stride[1], kernel[0] // stride[0] * wide)
    loaded.csr_convolve(batch, rows, shape, (LONG * 2)(*size), (LONG * 2)(*stride), (LONG * 2)(*padding), crow.data_ptr(), col.data_ptr(),
                        values.data_ptr(), place.data_ptr(), x.data_ptr(), scratch.data_ptr(), y.data_ptr(), given, relu, width, threads)
    return y


@functools.lru_cache(maxsize=256)
def row_places(columns: int, stride: int) -> Tensor:
    """Offset of each row of a dense operand."""
    return torch.arange(columns, dtype=torch.int32, device="cpu") * stride


@functools.lru_cache(maxsize=256)
def tap_places(channels: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], height: int,
               width: int) -> Tensor:
    """Offset of tap (c, r, s) in an image split into stride x stride phases of height x width pixels, [channels * r * s] int32."""
    r, s = torch.arange(kernel[0], device="cpu") * dilation[0], torch.arange(kernel[1], device="cpu") * dilation[1]
    phase = (r % stride[0]).unsqueeze(1) * stride[1] + s % stride[1]
    inside = (r // stride[0]).unsqueeze(1) * width + s // stride[1]
    channel = torch.arange(channels, device="cpu").view(-1, 1, 1) * (stride[0] * stride[1])
    return ((channel + phase) * (height * width) + inside).reshape(-1).to(torch.int32)
