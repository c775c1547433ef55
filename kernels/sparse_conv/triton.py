"""Triton kernel for sparse_conv (format: reference.py): the convolution of channels_last images as an implicit matrix product.

Rows of the product are output pixels, its columns V output channels, and the contraction runs over the block's kept (r, s, channel group)
entries: one program owns BP pixels, one block and one of SPLITS shares of the block's steps. A gather reads G consecutive channels of
one input pixel; taps outside the image are masked. Small maps have too few pixels to fill a GPU, so the contraction is split and the
last program to arrive adds the shares in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import convolution, device, precision
from ..operator import interpreted

STAGES = 3
HEIGHTS = (16, 32, 64, 128)
TILES = (64, 128)
GROUPS = (1, 8, 16)
SPLITS = (1, 2, 4, 8, 16)
# Most lines (and columns) of a padded image and a tap's reach together. A pixel that does not exist has line -2^30: above any image, whatever the tap.
MOST_LINES = 1 << 29


def warps_for(height: int, pixels: int, group: int, itemsize: int) -> int:
    """Warps per program: eight for large tiles, and for what is gathered one by one in float32 or for few outputs, which would spill with four."""
    return 8 if height * pixels >= 128 * 64 or (group == 1 and (itemsize == 4 or height < 64)) else 4


def registers_for(group: int, splits: int) -> int | None:
    """Most registers per thread. Left alone, ptxas makes do with 128 on sm_100 and spills a few where a product is split, which is where so few programs
    run that registers are plenty, and where channels are gathered one by one; with all 255 for the latter it spilled on sm_80."""
    if group == 1:
        return 224
    return 255 if splits > 1 else None


CONFIGS = tuple(
    {"height": height, "step": 64, "pixels": pixels, "group": group, "splits": splits, "warps": warps_for(height, pixels, group, 2)}
    for height in HEIGHTS
    for pixels in TILES
    for group in GROUPS
    for splits in SPLITS
    if pixels == 64 or (height == 64 and group > 1)
)


@triton.jit
def sparse_conv_kernel(x, values, kept, step_ptr, order, y, scale, bias, residual, partial, counter, rows, pixels, blocks, groups, height,
                       width, out_height, out_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, V: tl.constexpr,
                       STEP: tl.constexpr, BP: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
                       PRECISION: tl.constexpr, WIDEN: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
                       HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid (tiles of BP pixels * blocks, SPLITS); blocks are the fast dimension, so that they share a tile's pixels in the cache.

    x: [N, height, width, groups * G]; y, residual: [pixels, rows], pixels = N * out_height * out_width; partial:
    [SPLITS, tiles * BP, blocks * V] float32; counter: [tiles, blocks] int32, zero. WIDEN computes in float32 (interpreter).
    """
    block = tl.load(order + tl.program_id(0) % blocks)
    tile = tl.program_id(0) // blocks
    split = tl.program_id(1)
    first = tl.load(step_ptr + block)
    last = tl.load(step_ptr + block + 1)
    share = (last - first + SPLITS - 1) // SPLITS
    low = tl.minimum(first + split * share, last)
    high = tl.minimum(low + share, last)
    v = tl.arange(0, V)
    k = tl.arange(0, STEP)
    channels = groups * G
    pixel = tile * BP + tl.arange(0, BP)
    image = pixel // (out_height * out_width)
    inside = pixel % (out_height * out_width)
    top = (inside // out_width) * stride_h - pad_h
    left = (inside % out_width) * stride_w - pad_w
    # Pixels behind the last one get a row from which no tap reaches the image.
    top = tl.where(pixel < pixels, top, -(1 << 30))
    corner = ((image.to(tl.int64) * height + top) * width + left) * channels
    panel = values + low.to(tl.int64) * (STEP * V) + k[:, None] * V + v[None, :]
    kept += low.to(tl.int64) * (STEP // G) + k // G
    acc = tl.zeros([BP, V], tl.float32)
    for _ in tl.range(low, high, num_stages=STAGES):
        code = tl.load(kept)
        down = (code >> 24) * dilation_h
        right = ((code >> 16) & 255) * dilation_w
        behind = (down * width + right) * channels + (code & 65535) * G
        behind = tl.max_contiguous(tl.multiple_of(behind + k % G, G), G)
        h = top[:, None] + tl.max_constancy(down, G)[None, :]
        w = left[:, None] + tl.max_constancy(right, G)[None, :]
        real = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        seen = tl.load(x + corner[:, None] + behind[None, :], mask=real, other=0.0)
        weight = tl.load(panel)
        if WIDEN:
            seen = seen.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(seen, weight, acc, input_precision=PRECISION)
        kept += STEP // G
        panel += STEP * V

    row = block * V + v
    here = tl.arange(0, BP)
    done = True
    if SPLITS > 1:
        across = blocks * V
        size = (tl.num_programs(0) // blocks).to(tl.int64) * BP * across
        partial += tile.to(tl.int64) * BP * across + block * V
        spot = here[:, None] * across + v[None, :]
        tl.store(partial + split * size + spot, acc)
        done = device.arrive(counter + tile * blocks + block, SPLITS)
    if done:
        if SPLITS > 1:
            acc = tl.zeros([BP, V], tl.float32)
            for s in range(SPLITS):
                acc += tl.load(partial + s * size + spot, cache_modifier=".cg")
        start = tile.to(tl.int64) * BP * rows + block * V
        target = here[:, None] * rows + v[None, :]
        mask = (pixel < pixels)[:, None] & (row < rows)[None, :]
        z = device.finish(acc, row[None, :], target, mask, scale, bias, residual + start, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
        tl.store(y + start + target, z.to(y.dtype.element_ty), mask=mask)


def tile_for(height: int, group: int, itemsize: int, rounding: str, pixels: int, blocks: int) -> int:
    """Output pixels per program: many where 16-bit channels are gathered in groups for many pixels, few where ptxas would spill (float32 one by one)."""
    if itemsize == 4 and rounding == "ieee" and group == 1 and height == HEIGHTS[-1]:
        return 16
    return 128 if height == 64 and group > 1 and itemsize == 2 and pixels * blocks >= 128 * 2 * 132 else 64


def splits_for(blocks: int, tiles: int, steps: int) -> int:
    """Shares per block so that an H200 (132 multiprocessors) has two programs on each; a share keeps at least four steps."""
    splits = 1
    while splits < SPLITS[-1] and blocks * tiles * splits < 2 * 132 and steps // (splits * 2) >= 4:
        splits *= 2
    return splits


def launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str, kernel, stride,
           padding, dilation, y: Tensor | None = None) -> Tensor:
    """y [N, rows, h, w] (channels_last) for x [N, c_in, H, W]; x in another memory format is copied. `y` may be given to be filled."""
    kept, step_ptr, order, _ = index
    total, step, height = values.shape
    group, _, _, tile, splits, warps = options
    batch, channels, image_height, image_width = x.shape
    size = convolution.output_size((image_height, image_width), kernel, stride, padding, dilation)
    pixels = batch * size[0] * size[1]
    taps = [spacing * (length - 1) for spacing, length in zip(dilation, kernel)]
    lines = max(size[d] * stride[d] + padding[d] + taps[d] for d in (0, 1))
    if pixels >= 2**31 - 256 or lines > MOST_LINES or (taps[0] * image_width + taps[1] + 1) * channels >= 2**31:
        images = f"{pixels} output pixels of images of {channels} x {image_height} x {image_width}, taps up to {taps[0]} x {taps[1]} pixels apart,"
        raise ValueError(f"{images} are more than the kernel's 32-bit integers can count")
    source = x.permute(0, 2, 3, 1).contiguous()
    y = x.new_empty(batch, *size, rows) if y is None else y
    added = y if residual is None else residual.permute(0, 2, 3, 1).contiguous()
    blocks = order.numel()
    rounding = "tf32" if values.dtype == torch.float32 and precision.products_in_tf32() else "ieee"
    tile = tile or tile_for(height, group, values.element_size(), rounding, pixels, blocks)
    tiles = -(-pixels // tile)
    splits = splits or splits_for(blocks, tiles, total // max(1, blocks))
    warps = warps or warps_for(height, tile, group, values.element_size())
    partial, counter = device.shares(x, splits, blocks * height * tiles * tile, blocks * tiles)
    with torch.cuda.device_of(x):
        sparse_conv_kernel[(blocks * tiles, splits)](
            source, values, kept, step_ptr, order, y, y if scale is None else scale, y if bias is None else bias, added, partial, counter,
            rows, pixels, blocks, channels // group, image_height, image_width, *size, *stride, *padding, *dilation,
            V=height, STEP=step, BP=tile, G=group, SPLITS=splits, STAGES=STAGES, PRECISION=rounding, WIDEN=interpreted(),
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            num_warps=warps, **({} if interpreted() else {"maxnreg": registers_for(group, splits)}),
        )
    return y.permute(0, 3, 1, 2)
