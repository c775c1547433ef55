"""Which sparse forms of a layer are worth measuring on its device, and building them.

A prior only removes what cannot win there: a format whose bytes are not fewer than dense, more columns of x than a kernel is made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import modules
from .csr.op import ENGINES, usable
from .sparse_conv.reference import channels_last, group_for
from .vector_block.reference import kept_columns

RUN16_COLUMNS = 16
TWO_FOUR_COLUMNS = 256
LONG_CONTRACTION = 2048
MOST_KEPT_VECTORS = 0.9


@dataclass(frozen=True)
class Candidate:
    """A sparse form of one layer: its name in reports and how to build it."""

    label: str
    build: Callable[[], nn.Module]


def eligible(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> list[Candidate]:
    """Candidates for `layer` on an input of that shape."""
    weight = layer.weight.detach()
    mask = (weight != 0).flatten(1)
    kind = modules.SparseConv2d if isinstance(layer, nn.Conv2d) else modules.SparseLinear
    found: list[Candidate] = []

    def offer(label: str, **options) -> None:
        found.append(Candidate(label, lambda: kind.from_dense(layer, **options)))

    sample = weight.new_empty(0)
    for engine in ENGINES if weight.device.type == "cpu" else ENGINES[:1] if kind is modules.SparseLinear else ():
        if usable(engine, sample, weight):
            offer(f"csr {engine}", format="csr", engine=engine)
    if not weight.is_cuda or torch.version.hip is not None or not _has_triton():
        return found
    if kind is modules.SparseConv2d:
        _convolutions(offer, layer, mask)
    else:
        _matrices(offer, weight, mask, math.prod(shape[:-1]))
    return found


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _matrices(offer, weight: Tensor, mask: Tensor, columns: int) -> None:
    if columns <= RUN16_COLUMNS:
        for coding, name in enumerate(("nibbles", "bytes")):
            for warps in (4, 8):
                offer(f"run16 {name} {warps} warps", format="run16", coding=coding, warps=warps)
    for height in (128, 64):
        if kept_columns(mask, height) <= MOST_KEPT_VECTORS:
            offer(f"vector_block {height}", format="vector_block", height=height)
    half = weight.dtype in (torch.bfloat16, torch.float16) and all(size % 16 == 0 for size in weight.shape)
    if half and columns >= TWO_FOUR_COLUMNS:
        offer("two_four", format="two_four")


def _convolutions(offer, layer: nn.Conv2d, mask: Tensor) -> None:
    group = group_for(layer.in_channels)
    kernel = layer.kernel_size
    if group == 1:
        return
    for height in (64, 128):
        if kept_columns(channels_last(mask, kernel), height, group) <= MOST_KEPT_VECTORS or _few_pixels(layer):
            offer(f"sparse_conv {height}x{group}", format="sparse_conv", height=height)


def _few_pixels(layer: nn.Conv2d) -> bool:
    """Wide layers sit on small maps, where splitting the contraction may win even with a full list."""
    return layer.weight[0].numel() >= LONG_CONTRACTION
