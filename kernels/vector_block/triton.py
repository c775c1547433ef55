"""Triton kernel for the vector-block format (reference.py): y = act(scale * (W x) + bias + residual) for any number of columns of x.

One program owns one block of V rows, BN columns of x and one of SPLITS shares of the block's steps. A step loads a [STEP, V] panel
(contiguous), STEP column numbers, gathers STEP rows of x (each BN contiguous elements) and multiplies on the tensor cores; the loop is
software-pipelined, so gathers are asynchronous copies. Shares are summed in a fixed order by the last program to arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, precision
from ..operator import interpreted

STAGES = 3
ALIGN = 16
HEIGHTS = (16, 32, 64, 128)
WIDTHS = (16, 32, 64, 128)
SPLITS = (1, 2, 4, 8, 16)
GROUP = tl.constexpr(8)


def warps_for(height: int, width: int) -> int:
    """Warps per program: eight for large tiles, and for 128 x 16, where ptxas spills four registers on sm_80 with four warps."""
    return 8 if height * width >= 128 * 64 or (height, width) == (128, 16) else 4


def registers_for(height: int, width: int) -> int | None:
    """Most registers per thread: for small tiles, and for 128 x 32, ptxas makes do with 40 to 80 and spills some of them in one configuration or
    another, unless it is told that it need not."""
    return 128 if width == WIDTHS[0] else 168 if height * width <= 64 * 32 or (height, width) == (128, 32) else None


CONFIGS = tuple(
    {"height": height, "step": 64, "width": width, "splits": splits, "warps": warps_for(height, width)}
    for height in HEIGHTS
    for width in WIDTHS
    for splits in SPLITS
    if height * width <= 128 * 64
)


@triton.jit
def _place(number, blocks, tiles):
    """(rank of the block, tile) of program `number`."""
    first = number // (GROUP * blocks) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = number % (GROUP * blocks)
    return within // size, first + within % size


@triton.jit
def vector_block_kernel(x, values, kept, step_ptr, order, y, scale, bias, residual, partial, counter, rows, batch, blocks, tiles,
                        x_stride, V: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
                        PRECISION: tl.constexpr, WIDEN: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
                        HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid (blocks * tiles of BN columns, SPLITS), in groups of up to GROUP tiles: neighbours share a block's panels in the cache, and what a
    group reads of x stays there for all blocks.

    x: [columns, x_stride], zero behind column `batch`, x_stride a multiple of 16; y, residual: [batch, rows]; partial:
    [SPLITS, blocks * V, tiles * BN] float32; counter: [blocks, tiles] int32, zero. WIDEN computes in float32 (interpreter).
    """
    rank, tile = _place(tl.program_id(0), blocks, tiles)
    block = tl.load(order + rank)
    split = tl.program_id(1)
    first = tl.load(step_ptr + block)
    last = tl.load(step_ptr + block + 1)
    share = (last - first + SPLITS - 1) // SPLITS
    low = tl.minimum(first + split * share, last)
    high = tl.minimum(low + share, last)
    v = tl.arange(0, V)
    k = tl.arange(0, STEP)
    column = tile * BN + tl.arange(0, BN)
    panel = values + low.to(tl.int64) * (STEP * V) + k[:, None] * V + v[None, :]
    kept += low.to(tl.int64) * STEP + k
    inside = (column < x_stride)[None, :]
    acc = tl.zeros([V, BN], tl.float32)
    for _ in tl.range(low, high, num_stages=STAGES):
        wanted = tl.load(kept)
        w = tl.load(panel)
        source = x + wanted.to(tl.int64)[:, None] * x_stride + column[None, :]
        gathered = tl.load(source, mask=inside, other=0.0)
        kept += STEP
        panel += STEP * V
        if WIDEN:
            w = w.to(tl.float32)
            gathered = gathered.to(tl.float32)
        acc = tl.dot(tl.trans(w), gathered, acc, input_precision=PRECISION)

    # Read again, so that it need not stay in a register during the loop.
    block = tl.load(order + rank, volatile=True)
    row = block * V + v
    done = True
    if SPLITS > 1:
        across = tiles * BN
        size = tl.cast(blocks, tl.int64) * V * across
        partial += block.to(tl.int64) * V * across + tile * BN
        spot = v[:, None] * across + tl.arange(0, BN)[None, :]
        tl.store(partial + split * size + spot, acc)
        done = device.arrive(counter + block * tiles + tile, SPLITS)
    if done:
        if SPLITS > 1:
            acc = tl.zeros([V, BN], tl.float32)
            # Not unrolled: sixteen tiles in flight would need more registers than there are.
            for s in range(SPLITS):
                acc += tl.load(partial + s * size + spot, cache_modifier=".cg")
        corner = block * V + tile.to(tl.int64) * BN * rows
        target = v[:, None] + tl.arange(0, BN)[None, :] * rows
        mask = (row < rows)[:, None] & (column < batch)[None, :]
        z = device.finish(acc, row[:, None], target, mask, scale, bias, residual + corner, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
        tl.store(y + corner + target, z.to(y.dtype.element_ty), mask=mask)


def width_for(batch: int, height: int, itemsize: int) -> int:
    """Columns of x per program: the next power of two, at most 128, and 64 where registers would not hold the accumulator."""
    limit = 128 if itemsize == 2 and height <= 64 else 64 if itemsize == 2 else 32
    width = WIDTHS[0]
    while width < batch and width < limit:
        width *= 2
    return width


def splits_for(blocks: int, tiles: int, steps: int) -> int:
    """Shares per block so that an H200 (132 multiprocessors) has two programs on each; a share keeps at least four steps."""
    splits = 1
    while splits < SPLITS[-1] and blocks * tiles * splits < 2 * 132 and steps // (splits * 2) >= 4:
        splits *= 2
    return splits


def launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str,
           y: Tensor | None = None) -> Tensor:
    """y [N, rows] for x [N, columns]; `options` is (width, splits, warps), 0 meaning the default. `y` may be given to be filled.

    x is transposed first, which is small beside the weight.
    """
    kept, step_ptr, order, _ = index
    total, step, height = values.shape
    batch = x.shape[0]
    stride = -(-batch // ALIGN) * ALIGN
    source = x.t().contiguous() if stride == batch else torch.nn.functional.pad(x.t(), (0, stride - batch))
    y = x.new_empty(batch, rows) if y is None else y
    blocks = order.numel()
    width = options[0] or width_for(batch, height, values.element_size())
    tiles = -(-batch // width)
    splits = options[1] or splits_for(blocks, tiles, total // max(1, blocks))
    warps = options[2] or warps_for(height, width)
    partial, counter = device.shares(x, splits, blocks * height * tiles * width, blocks * tiles)
    rounding = "tf32" if values.dtype == torch.float32 and precision.products_in_tf32() else "ieee"
    added = y if residual is None else residual
    with torch.cuda.device_of(x):
        vector_block_kernel[(blocks * tiles, splits)](
            source, values, kept, step_ptr, order, y, y if scale is None else scale, y if bias is None else bias, added, partial, counter,
            rows, batch, blocks, tiles, stride,
            V=height, STEP=step, BN=width, SPLITS=splits, STAGES=STAGES, PRECISION=rounding, WIDEN=interpreted(),
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            num_warps=warps, **({} if interpreted() else {"maxnreg": registers_for(height, width)}),
        )
    return y
