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

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-shared", "-fPIC")
SOURCE = Path(__file__).with_name("cpu.c")
SLACK = 16
# Widths with a tile of their own, which reads nothing behind them.
EXACT = (4, 8)
# Bytes of the dense operand that the second-level cache shall hold, and the first-level cache.
ON_CHIP = 1024 * 1024
NEAR = 28 * 1024
# A block of the operand pays off where a row has this many multiply-adds of vectors in it, vectors enough to share an entry's cost, and where
# a row by itself, through the taps of a convolution, uses what it fetches less often than this.
WORK, VECTORS, REUSE = 128, 3, 1.75
# Rows of a dense operand from which its tiles are copied to lie in one piece: at equal distances so many rows meet in few sets of a cache.
FAR = 2560
# cpu.c addresses the image of a convolution by 32-bit offsets.
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
        for extra in ((*wide, "-fopenmp"), ("-fopenmp",), wide, ()):
            command = [compiler, *FLAGS, *extra, "-o", str(built), str(SOURCE)]
            if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                cache.write_atomically(target, built.read_bytes())
                return True
    return False


def bound(built: Path) -> ctypes.CDLL:
    """The functions of a built cpu.c with their signatures; OSError or AttributeError where the file is something else."""
    loaded = ctypes.CDLL(str(built))
    loaded.csr_images.argtypes = [*[LONG] * 4, POINTER, POINTER, INT, *[POINTER] * 3, LONG, POINTER, *[LONG] * 4, POINTER, INT, LONG, LONG, INT]
    loaded.csr_vector.argtypes = [LONG, POINTER, POINTER, INT, *[POINTER] * 4, INT, INT]
    loaded.csr_convolve.argtypes = [*[LONG] * 3, *[POINTER] * 6, INT, *[POINTER] * 6, INT, LONG, LONG, INT]
    loaded.csr_widest.argtypes, loaded.csr_widest.restype = [], INT
    loaded.csr_convolve.restype = loaded.csr_images.restype = loaded.csr_vector.restype = None
    loaded.widest = loaded.csr_widest()
    return loaded


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
        loaded = bound(target)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    return loaded if _agrees(loaded) else None


@torch.autocast("cpu", enabled=False)
def _agrees(loaded: ctypes.CDLL) -> bool:
    """Whether small products come out right, whatever the caller's default data type and device."""
    generator, plain = torch.Generator("cpu").manual_seed(0), {"dtype": torch.float32, "device": "cpu"}
    weight = torch.randn(9, 37, generator=generator, **plain) * (torch.rand(9, 37, generator=generator, **plain) < 0.4)
    x = torch.randn(37, 53, generator=generator, **plain)
    for narrow in (False, True):
        values, index = reference.pack(weight, narrow=narrow)
        if not torch.allclose(matrix(loaded, x, values, *index, None, False, 1), weight @ x, atol=1e-4):
            return False
        if not torch.allclose(vector(loaded, x[:, 0].contiguous(), values, *index, None, False, 1), weight @ x[:, 0], atol=1e-4):
            return False
    return True


def _tile(loaded: ctypes.CDLL, rows: int, overhang: int = 0) -> int:
    """Columns per tile: as many as keep `rows` rows of the dense operand, `overhang` longer than the tile, in the second-level cache."""
    widest = loaded.widest
    return widest if rows * (widest + overhang) * 4 <= ON_CHIP else widest // 2


def _block(loaded: ctypes.CDLL, columns: int, width: int, entries: float, group: int = 1, overhang: int = 0) -> int:
    """Rows of the dense operand that are gone through at a time: as many groups of `group` rows, which take up one line of `width` +
    `overhang` floats, as stay in the first-level cache; `columns` where that does not pay. `entries`: kept weights per row of the matrix."""
    block = max(1, NEAR // ((width + overhang) * 4)) * group
    vectors = width * 8 / loaded.widest
    pays = block < columns and vectors >= VECTORS and entries * block / columns * vectors >= WORK
    return block if pays and entries * group / columns * width / (width + overhang) < REUSE else max(1, columns)


def _columns(col: Tensor) -> tuple[int, bool]:
    """The address of the column numbers, and whether they have 32 bits instead of 16. ValueError for any others."""
    if col.dtype not in (torch.int16, torch.int32):
        raise ValueError(f"the column numbers are {col.dtype}, but torch.int16 or torch.int32 is needed")
    return col.data_ptr(), col.dtype == torch.int32


def vector(loaded: ctypes.CDLL, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, relu: bool,
           threads: int) -> Tensor:
    """act(W x + bias), [rows], for x [columns]; float32, contiguous, on the CPU."""
    rows = crow.numel() - 1
    y = x.new_empty(rows)
    given = None if bias is None else bias.data_ptr()
    loaded.csr_vector(rows, crow.data_ptr(), *_columns(col), values.data_ptr(), x.data_ptr(), y.data_ptr(), given, relu, threads)
    return y


def matrix(loaded: ctypes.CDLL, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, relu: bool,
           threads: int) -> Tensor:
    """act(W x + bias), [(images,) rows, n], for x [(images,) columns, n] of any strides, float32, on the CPU."""
    columns, n = x.shape[-2:]
    rows, entries = crow.numel() - 1, values.numel() / max(1, crow.numel() - 1)
    y = x.new_empty(*x.shape[:-2], rows, n)
    if not y.numel():
        return y
    given = None if bias is None else bias.data_ptr()
    tile = loaded.widest
    # Images are multiplied where they lie; at multiples of 1 KB their rows would push each other out of the first-level cache.
    block = _block(loaded, columns, min(n, tile), entries) if x.ndim == 2 or n % 256 else max(1, columns)
    if block >= columns:
        tile = _tile(loaded, columns)

    def multiply(part: Tensor, images: int, width: int, first: int, step: int) -> None:
        loaded.csr_images(images, rows, columns, width, crow.data_ptr(), *_columns(col), values.data_ptr(), None, part.data_ptr(),
                          columns * width, y.data_ptr() + 4 * first, step, n, width, width, given, relu, tile, block, threads)

    cut = n - n % tile if x.ndim == 2 and n > tile and (block < columns or columns >= FAR) else 0
    if cut:
        multiply(x[:, :cut].unflatten(1, (-1, tile)).transpose(0, 1).contiguous(), cut // tile, tile, 0, tile)
    if cut < n:
        rest = x[..., cut:].contiguous()
        multiply(rest if n - cut in EXACT or (n - cut) % SLACK == 0 else _with_slack(rest), x.shape[0] if x.ndim == 3 else 1, n - cut, cut,
                 rows * n)
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
    phases, overhang = stride[0] * stride[1], kernel[0] * dilation[0] // stride[0] * wide
    tile, taps = _tile(loaded, channels * phases, overhang), kernel[0] * kernel[1]
    across = min(tile, (size[0] - 1) * wide + size[1])
    block = _block(loaded, channels * taps, across, values.numel() / max(1, rows), taps, (phases - 1) * across + phases * overhang)
    loaded.csr_convolve(batch, rows, channels * taps, shape, (LONG * 2)(*size), (LONG * 2)(*stride), (LONG * 2)(*padding), crow.data_ptr(),
                        *_columns(col), values.data_ptr(), place.data_ptr(), x.data_ptr(), scratch.data_ptr(), y.data_ptr(), given, relu, tile,
                        block, threads)
    return y


@functools.lru_cache(maxsize=256)
def tap_places(channels: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], height: int,
               width: int) -> Tensor:
    """Offset of tap (c, r, s) in an image split into stride x stride phases of height x width pixels, [channels * r * s] int32."""
    r, s = torch.arange(kernel[0], device="cpu") * dilation[0], torch.arange(kernel[1], device="cpu") * dilation[1]
    phase = (r % stride[0]).unsqueeze(1) * stride[1] + s % stride[1]
    inside = (r // stride[0]).unsqueeze(1) * width + s // stride[1]
    channel = torch.arange(channels, device="cpu").view(-1, 1, 1) * (stride[0] * stride[1])
    return ((channel + phase) * (height * width) + inside).reshape(-1).to(torch.int32)
