"""Triton kernel for RUN16 (format: reference.py): y = act(scale * (W x) + bias + residual) for up to 8 columns of x per program.

One program owns one slice of 32 rows and one of SPLITS shares of its runs; thread t of W warps handles lane t % 32 (one row) of every
W-th run, so 32 threads gather x at 32 different rows' columns and every weight load is coalesced. All tensors of the inner loop have the
same shape [32 W], so the compiler inserts no layout conversion. Shares are summed in a fixed order by the last program to arrive.
bfloat16 is never computed with: 16-bit words are shifted into float32 bit patterns, which the interpreter does exactly, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..operator import aligned, interpreted
from .reference import LANES

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MAX_BATCH = 8
SPLITS = (1, 2, 4, 8)
CONFIGS = tuple({"warps": w, "splits": s} for w in (4, 8) for s in SPLITS)


def registers_for(columns: int) -> int | None:
    """Most registers per thread: with 8 columns of x ptxas makes do with 40 on sm_100 and spills two in some cases, unless it is told that it need not.

    64 leave room for 32 warps on a multiprocessor, which is what `splits_for` wants; float16 on sm_80 spills with 56.
    """
    return 64 if columns == MAX_BATCH else None


@triton.jit
def _word(word, j: tl.constexpr, KIND: tl.constexpr):
    """Number j of a 64-bit word as float32: four 16-bit numbers, or two float32."""
    if KIND == 2:
        return (word >> (32 * j)).to(tl.int32).to(tl.float32, bitcast=True)
    half = (word >> (32 * (j // 2))).to(tl.int32)
    if KIND == 1:
        return (half >> (16 * (j % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    bits = half & -65536 if j % 2 == 1 else half << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _single(x, column, KIND: tl.constexpr):
    """x[column] as float32 for one column of x; x points to int16 (16-bit kinds) or float32."""
    bits = tl.load(x + column)
    if KIND == 2:
        return bits
    if KIND == 1:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _step(column, origin, word, second, e: tl.constexpr, CODING: tl.constexpr):
    """Column of entry e of a run, from the column of entry e - 1 (nibbles) or of the run's first entry (bytes)."""
    if e == 0:
        return origin
    if CODING == 1:
        half = ((word if e < 8 else second) >> (32 * ((e % 8) // 4))).to(tl.int32)
        return origin + ((half >> (8 * (e % 4))) & 255)
    half = (word >> (32 * (e // 8))).to(tl.int32)
    return column + ((half >> (4 * (e % 8))) & 15)


@triton.jit
def run16_kernel(x, values, start, gaps, perm, slice_ptr, y, scale, bias, residual, partial, counter, rows, columns, batch,
                 chunks, NP: tl.constexpr, KIND: tl.constexpr, CODING: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SPLITS: tl.constexpr,
                 HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid (slices * chunks of NP columns of x, SPLITS); chunks are the fast dimension, so that they share a slice's weights in the cache.

    x: [chunks, columns] if NP is 1, else [chunks, columns, words] int64 (NP numbers per column); values, gaps: int64 words;
    y, residual: [batch, rows]; partial: [SPLITS, chunks, NP, 32 slices] float32; counter: [slices, chunks] int32, zero.
    """
    PLANES: tl.constexpr = 8 if KIND == 2 else 4
    PER: tl.constexpr = 16 // PLANES
    BIG: tl.constexpr = 64 // (32 if KIND == 2 else 16)
    WORDS: tl.constexpr = (NP + BIG - 1) // BIG
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    slice_id = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(1)
    first = tl.load(slice_ptr + slice_id)
    last = tl.load(slice_ptr + slice_id + 1)
    share = (last - first + SPLITS - 1) // SPLITS
    low = tl.minimum(split * share, last - first)
    high = tl.minimum(low + share, last - first)
    lane = thread % 32
    runs = high - low
    base = first.to(tl.int64) + low
    start += base * 32 + lane
    gaps += base * (32 * (1 + CODING)) + lane
    values += base * (32 * PLANES) + lane
    x += chunk.to(tl.int64) * columns * (1 if NP == 1 else WORDS)

    zero = tl.zeros([32 * WARPS], tl.float32)
    acc = (zero,) if NP == 1 else ((zero, zero) if NP == 2 else ((zero,) * 4 if NP == 4 else (zero,) * 8))
    # A warp behind the last run reads that run again and drops the sums: masked loads take two instructions more each (a register set to zero, an
    # eviction policy of their own), about one per entry.
    for c in range(0, runs, WARPS):
        at = tl.minimum(c + warp, runs - 1)
        if WIDE:
            at = at.to(tl.int64)
        before = acc
        column = tl.load(start + at * 32).to(tl.int32)
        if not WIDE:
            column = column & 0xFFFF
        origin = column
        word = tl.load(gaps + at * (32 * (1 + CODING)), eviction_policy="evict_first")
        second = word
        if CODING == 1:
            second = tl.load(gaps + at * 64 + 32, eviction_policy="evict_first")
        for p in tl.static_range(PLANES):
            stored = tl.load(values + at * (32 * PLANES) + 32 * p, eviction_policy="evict_first")
            for j in tl.static_range(PER):
                column = _step(column, origin, word, second, p * PER + j, CODING)
                weight = _word(stored, j, KIND)
                if NP == 1:
                    acc = (tl.fma(weight, _single(x, column, KIND), acc[0]),)
                else:
                    for q in tl.static_range(WORDS):
                        bits = tl.load(x + column * WORDS + q)
                        for n in tl.static_range(min(NP, BIG)):
                            acc = acc[:q * BIG + n] + (tl.fma(weight, _word(bits, n, KIND), acc[q * BIG + n]),) + acc[q * BIG + n + 1:]
        for n in tl.static_range(NP):
            acc = acc[:n] + (tl.where(c + warp < runs, acc[n], before[n]),) + acc[n + 1:]

    here = tl.arange(0, 32)
    place = slice_id * 32 + here
    row = tl.load(perm + place)
    lanes_all = tl.num_programs(0) // chunks * 32
    done = True
    if SPLITS > 1:
        for n in tl.static_range(NP):
            total = tl.sum(tl.reshape(acc[n], (WARPS, 32)), axis=0)
            spot = ((split * chunks + chunk) * NP + n).to(tl.int64) * lanes_all + place
            tl.store(partial + spot, total)
        done = device.arrive(counter + slice_id * chunks + chunk, SPLITS)
    if done:
        for n in tl.static_range(NP):
            if SPLITS > 1:
                total = tl.zeros([32], tl.float32)
                for s in tl.static_range(SPLITS):
                    spot = ((s * chunks + chunk) * NP + n).to(tl.int64) * lanes_all + place
                    total += tl.load(partial + spot, cache_modifier=".cg")
            else:
                total = tl.sum(tl.reshape(acc[n], (WARPS, 32)), axis=0)
            column_out = chunk * NP + n
            mask = row < tl.where(column_out < batch, rows, 0)
            target = column_out.to(tl.int64) * rows + row
            z = device.finish(total, row, target, mask, scale, bias, residual, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
            tl.store(y + target, z.to(y.dtype.element_ty), mask=mask)


def padded_batch(batch: int) -> int:
    """Columns of x that one program handles."""
    return 1 if batch == 1 else 2 if batch == 2 else 4 if batch <= 4 else MAX_BATCH


def splits_for(slices: int, chunks: int, warps: int, longest: int) -> int:
    """Shares per slice so that an H200 (132 multiprocessors, 32 warps wanted on each) is full; a share keeps at least one run per warp."""
    wanted = 132 * 32 // max(1, slices * chunks * warps)
    splits = 1
    while splits * 2 <= min(wanted, SPLITS[-1]) and splits * 2 * warps <= longest:
        splits *= 2
    return splits


def _words(x: Tensor, np_: int, chunks: int) -> Tensor:
    """x [N, columns] as the kernel reads it, in one copy, or two where zeros are added."""
    if np_ == 1:
        return x.contiguous() if x.dtype == torch.float32 else x.contiguous().view(torch.int16)
    width = max(np_, 8 // x.element_size())
    missing = width * chunks - x.shape[0]
    if chunks == 1:
        packed = torch.nn.functional.pad(x.t(), (0, missing)) if missing else x.t().contiguous()
    else:
        padded = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        packed = padded.reshape(chunks, width, x.shape[1]).transpose(1, 2).contiguous()
    # Flat, because a dimension of size 1 may have a stride that cannot be viewed as words.
    return aligned(packed.flatten()).view(torch.int64)


def launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str,
           y: Tensor | None = None) -> Tensor:
    """y [N, rows] for x [N, columns]; `options` is (coding, warps, splits), 0 meaning the default. `y` may be given to be filled."""
    start, gaps, perm, slice_ptr, _ = index
    batch = x.shape[0]
    np_ = padded_batch(batch)
    chunks = -(-batch // np_)
    slices = slice_ptr.numel() - 1
    warps = options[1] or 4
    splits = options[2] or splits_for(slices, chunks, warps, start.shape[0] // max(1, slices))
    source = _words(x, np_, chunks)
    y = x.new_empty(batch, rows) if y is None else y
    partial, counter = device.shares(x, splits, chunks * np_ * slices * LANES, slices * chunks)
    with torch.cuda.device_of(x):
        run16_kernel[(slices * chunks, splits)](
            source, aligned(values).view(torch.int64), start, gaps, perm, slice_ptr, y,
            y if scale is None else scale, y if bias is None else bias, y if residual is None else residual, partial, counter,
            rows, columns, batch, chunks, NP=np_, KIND=KINDS[values.dtype], CODING=gaps.shape[1] - 1, WIDE=start.dtype == torch.int32,
            WARPS=warps, SPLITS=splits, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation, num_warps=warps, **({} if interpreted() else {"maxnreg": registers_for(np_)}),
        )
    return y
