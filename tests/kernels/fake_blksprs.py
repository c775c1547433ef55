"""A stand-in for blksprs 2.5 on the CPU: the same calls, and the same reasons why a graph cannot record them."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor


class Blksprs:
    """Products of block-sparse tensors [blocks, B, B]; while `recorder` captures, whatever would wait for the GPU raises."""

    def __init__(self, recorder) -> None:
        self.recorder, self.validation, self.validated, self.caches = recorder, True, 0, []

    def _wait(self, why: str) -> None:
        if self.recorder.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing ({why})")

    def _validate(self) -> None:
        if self.validation:
            self.validated += 1
            self._wait("validation")

    def to_sparse(self, x: Tensor, layout: Tensor, block: int, layout_cache: dict | None = None) -> Tensor:
        self._validate()
        self._wait("conversion")
        return x.view(layout.shape[1], block, layout.shape[2], block).transpose(1, 2)[layout[0]].contiguous()

    def matmul(self, x, layout_x, y, layout_y, layout_out, block, layout_cache=None):
        self._validate()
        cache = {} if layout_cache is None else layout_cache
        self.caches.append(cache)
        if "layout_indices_o" not in cache:
            self._wait("nonzero")
            cache["layout_indices_o"] = layout_out.nonzero()
        return self._dense(x, layout_x, block) @ self._dense(y, layout_y, block)

    def to_dense(self, x, layout, block, fill_value=0, layout_cache=None):
        self._validate()
        return x[None]

    @staticmethod
    def _dense(blocks: Tensor, layout: Tensor, block: int) -> Tensor:
        full = blocks.new_zeros(*layout.shape[1:], block, block)
        full[layout[0]] = blocks
        return full.transpose(1, 2).reshape(layout.shape[1] * block, layout.shape[2] * block)

    def install(self, monkeypatch) -> Blksprs:
        module = types.ModuleType("blksprs")
        module.ops = types.SimpleNamespace(to_sparse=self.to_sparse, matmul=self.matmul, to_dense=self.to_dense)
        module.utils = types.SimpleNamespace(disable_validation=lambda: setattr(self, "validation", False),
                                             enable_validation=lambda: setattr(self, "validation", True))
        self.tuned = {"matmul_kernel": {"64": "tuned for another shape"}, "to_dense_kernel": {"64": "tuned for another shape"}}
        inner = {"matmul": "matmul_kernel", "conversion": "to_dense_kernel"}
        monkeypatch.setitem(sys.modules, "blksprs", module)
        monkeypatch.setitem(sys.modules, "blksprs.ops", types.ModuleType("blksprs.ops"))
        for name, kernel in inner.items():
            found = types.ModuleType(f"blksprs.ops.{name}")
            setattr(found, kernel, types.SimpleNamespace(cache=self.tuned[kernel]))
            monkeypatch.setitem(sys.modules, found.__name__, found)
        return self


def blocks_layer(generator: torch.Generator) -> torch.nn.Linear:
    """A layer [192, 128] with two of its six 64 x 64 blocks."""
    layer = torch.nn.Linear(128, 192, bias=False)
    keep = torch.zeros(3, 2, dtype=torch.bool)
    keep[0, 1] = keep[2, 0] = True
    with torch.no_grad():
        layer.weight.copy_(torch.randn(192, 128, generator=generator))
        layer.weight.mul_(keep.repeat_interleave(64, 0).repeat_interleave(64, 1))
    return layer
