"""Which sparse forms of a layer are worth measuring on its device, and building them.

A prior only removes what cannot win there: a format whose bytes are not fewer than dense, more columns of x than a kernel is made for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import modules
from .convolution import output_size
from .csr.op import ENGINES, usable
from .sparse_conv.reference import channels_last, group_for
from .vector_block.reference import kept_columns

RUN16_COLUMNS = 16
TWO_FOUR_COLUMNS = 256
LONG_CONTRACTION = 2048
LONG_POINTWISE = 512
FEW_PIXELS = 1024
MOST_KEPT_VECTORS = 0.9


@dataclass(frozen=True)
class Candidate:
    """A sparse form of one layer: its name in reports and how to build it."""

    label: str
    build: Callable[[], nn.Module]


def eligible(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> list[Candidate]:
    """Candidates for `layer` on an input of that shape."""
    weight = layer.weight.detach()
    found: list[Candidate] = []
    sample = weight.new_empty(0)
    for engine in ENGINES if weight.device.type == "cpu" else ENGINES[:1] if isinstance(layer, nn.Linear) else ():
        if usable(engine, sample, weight):
            _offer(found, layer, f"csr {engine}", format="csr", engine=engine)
    if not weight.is_cuda or torch.version.hip is not None or not _has_triton():
        return found
    return found + on_gpu(layer, shape)


def on_gpu(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> list[Candidate]:
    """The candidates that run as Triton kernels. A convolution of 1 x 1 is also a matrix, whose columns of x are the output's pixels."""
    mask = (layer.weight.detach() != 0).flatten(1)
    found: list[Candidate] = []
    offer = functools.partial(_offer, found, layer)
    if isinstance(layer, nn.Linear):
        _matrices(offer, layer.weight, mask, math.prod(shape[:-1]))
        return found
    pixels = _pixels(layer, shape)
    _convolutions(offer, layer, mask, pixels)
    if layer.kernel_size == (1, 1):
        _matrices(offer, layer.weight.flatten(1), mask, pixels)
    return found


def _offer(found: list[Candidate], layer: nn.Module, label: str, **options) -> None:
    kind = modules.SparseConv2d if isinstance(layer, nn.Conv2d) else modules.SparseLinear
    found.append(Candidate(label, lambda: kind.from_dense(layer, **options)))


def _pixels(layer: nn.Conv2d, shape: tuple[int, ...]) -> int:
    """Output pixels of all images of an input [N, c, H, W] or [c, H, W]."""
    size = output_size(shape[-2:], layer.kernel_size, layer.stride, modules.padding(layer), layer.dilation)
    return math.prod(shape[:-3]) * math.prod(size)


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


def _convolutions(offer, layer: nn.Conv2d, mask: Tensor, pixels: int) -> None:
    group = group_for(layer.in_channels)
    kernel = layer.kernel_size
    if group == 1:
        return
    for height in (64, 128):
        if kept_columns(channels_last(mask, kernel), height, group) <= MOST_KEPT_VECTORS or _few_pixels(layer, pixels):
            offer(f"sparse_conv {height}x{group}", format="sparse_conv", height=height)


def _few_pixels(layer: nn.Conv2d, pixels: int) -> bool:
    """Whether the output's tiles leave a GPU idle, so that splitting the contraction may win even with a full list. Wide layers sit on small
    maps; 1 x 1 layers of some hundred channels may or may not."""
    contraction = layer.weight[0].numel()
    return contraction >= LONG_CONTRACTION or (layer.kernel_size == (1, 1) and contraction >= LONG_POINTWISE and pixels <= FEW_PIXELS)
