"""The sparse products that exist, as rivals of this project's kernels: torch CSR, BSR and 2:4, blksprs.

Each function gives calls of one product on as many copies of its weight as the cold-cache rule needs (`timing.copies_needed`), and the bytes
of the weight that one call reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import timing

BLOCK = 64
BSR_COLUMNS = 16
BSR_SETTINGS = [{"SPLIT_N": n, "GROUP_SIZE_ROW": 4, "num_warps": w, "num_stages": s} for n in (1, 2, 4, 8) for w in (4, 8) for s in (1, 3)]


@dataclass(frozen=True)
class Side:
    """The same call on several copies of a weight, and the bytes of one copy."""

    calls: list[Callable[[], Tensor]]
    weight_bytes: int


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def rotate(make: Callable[[], Callable[[], Tensor]], bytes_each: int, device: torch.device) -> Side:
    """The same call on as many copies of its weight as the cold-cache rule needs; `make` builds one copy."""
    return Side([make() for _ in range(timing.copies_needed(bytes_each, device))], bytes_each)


def torch_csr(layer: nn.Linear, x: Tensor) -> Side:
    csr = layer.weight.detach().to_sparse_csr()
    transposed = x.t().contiguous()

    def make() -> Callable[[], Tensor]:
        weight = csr.clone()
        return lambda: (weight @ transposed).t()

    return rotate(make, size((csr.values(), csr.col_indices(), csr.crow_indices())), x.device)


def torch_bsr(layer: nn.Linear, x: Tensor, settings: dict | None) -> Side:
    from torch.sparse._triton_ops import bsr_dense_addmm

    bsr = layer.weight.detach().to_sparse_bsr((BLOCK, BLOCK))
    columns = x.shape[0]
    # The kernel takes at least 16 columns.
    transposed = nn.functional.pad(x.t(), (0, max(0, BSR_COLUMNS - columns))).contiguous()
    target = x.new_zeros(layer.out_features, transposed.shape[1])

    def make() -> Callable[[], Tensor]:
        weight = bsr.clone()
        return lambda: bsr_dense_addmm(target, weight, transposed, beta=0, meta=settings).t()[:columns]

    return rotate(make, size((bsr.values(), bsr.col_indices(), bsr.crow_indices())), x.device)


def tuned_bsr(layer: nn.Linear, x: Tensor) -> Side:
    """The fastest of a small sweep of settings, so that the rival is no straw man."""
    best, fastest = None, float("inf")
    for settings in BSR_SETTINGS:
        try:
            (taken,) = timing.on_cuda([torch_bsr(layer, x, settings).calls], rounds=5)
        except Exception:
            continue
        if taken.median < fastest:
            best, fastest = settings, taken.median
    if best is None:
        raise RuntimeError("no setting of torch BSR ran")
    return torch_bsr(layer, x, best)


def torch_two_four(layer: nn.Linear, x: Tensor) -> Side:
    """torch's 2:4 tensor of the two largest of every four: another matrix than the masked one, so its error is against its own product."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

    fours = layer.weight.detach().view(layer.out_features, -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, fours.abs().topk(2, -1).indices, True)
    pruned = (fours * kept).view_as(layer.weight)
    padded = nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 16))
    sample = to_sparse_semi_structured(pruned)
    # Without cuSPARSELt the tensor belongs to CUTLASS, which has no algorithms to choose from.
    searched = isinstance(sample, SparseSemiStructuredTensorCUSPARSELT)
    algorithm = torch._cslt_sparse_mm_search(sample.packed, padded.t()) if searched else 0

    def make() -> Callable[[], Tensor]:
        weight = to_sparse_semi_structured(pruned)
        weight.alg_id_cusparselt = algorithm
        return lambda: nn.functional.linear(x, weight)

    return rotate(make, size([pruned]) * 9 // 16, x.device)


def blksprs_blocks(layer: nn.Linear, x: Tensor) -> Side:
    """blksprs: dense x (as one full block matrix) times the block-sparse transposed weight."""
    import blksprs as bs
    from blksprs.utils.blksprs_tensor import BlksprsTensor

    weight = layer.weight.detach().t().contiguous()[None]
    rows = -(-x.shape[0] // BLOCK) * BLOCK
    padded = nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))[None].contiguous()
    full = torch.ones(1, rows // BLOCK, x.shape[1] // BLOCK, dtype=torch.bool, device=x.device)
    layout = weight.view(1, weight.shape[1] // BLOCK, BLOCK, weight.shape[2] // BLOCK, BLOCK).any(4).any(2)
    out = torch.ones(1, rows // BLOCK, weight.shape[2] // BLOCK, dtype=torch.bool, device=x.device)
    left: BlksprsTensor = bs.ops.to_sparse(padded, full, BLOCK)
    right = bs.ops.to_sparse(weight, layout, BLOCK)

    def make() -> Callable[[], Tensor]:
        stored = right.clone()
        return lambda: bs.ops.to_dense(bs.ops.matmul(left, full, stored, layout, out, BLOCK), out, BLOCK)[0, : x.shape[0]]

    return rotate(make, size((right, layout)), x.device)
