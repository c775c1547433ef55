"""The sparse products that exist, as rivals of this project's kernels: torch CSR, BSR and 2:4, blksprs.

Each function gives calls of one product on as many copies of its weight as the cold-cache rule needs (`timing.copies_needed`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import timing

BLOCK = 64
BSR_SETTINGS = [{"SPLIT_N": n, "GROUP_SIZE_ROW": 4, "num_warps": w, "num_stages": s} for n in (1, 2, 4, 8) for w in (4, 8) for s in (1, 3)]


def rotate(make: Callable[[], Callable[[], Tensor]], bytes_each: int, device: torch.device) -> list[Callable[[], Tensor]]:
    """The same call on as many copies of its weight as the cold-cache rule needs; `make` builds one copy."""
    return [make() for _ in range(timing.copies_needed(bytes_each, device))]


def torch_csr(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    csr = layer.weight.detach().to_sparse_csr()
    transposed = x.t().contiguous()

    def make() -> Callable[[], Tensor]:
        weight = csr.clone()
        return lambda: (weight @ transposed).t()

    return rotate(make, csr.values().numel() * (csr.values().element_size() + 8), x.device)


def torch_bsr(layer: nn.Linear, x: Tensor, settings: dict | None) -> list[Callable[[], Tensor]]:
    from torch.sparse._triton_ops import bsr_dense_addmm

    bsr = layer.weight.detach().to_sparse_bsr((BLOCK, BLOCK))
    transposed = x.t().contiguous()
    target = x.new_zeros(layer.out_features, x.shape[0])

    def make() -> Callable[[], Tensor]:
        weight = bsr.clone()
        return lambda: bsr_dense_addmm(target, weight, transposed, beta=0, meta=settings).t()

    return rotate(make, bsr.values().numel() * bsr.values().element_size(), x.device)


def tuned_bsr(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    """The fastest of a small sweep of settings, so that the rival is no straw man."""
    best, fastest = None, float("inf")
    for settings in BSR_SETTINGS:
        try:
            (taken,) = timing.on_cuda([torch_bsr(layer, x, settings)], rounds=5)
        except Exception:
            continue
        if taken.median < fastest:
            best, fastest = settings, taken.median
    if best is None:
        raise RuntimeError("no setting of torch BSR ran")
    return torch_bsr(layer, x, best)


def torch_two_four(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
    """torch's 2:4 tensor of the two largest of every four: another matrix than the masked one, so its error is against its own product."""
    from torch.sparse import to_sparse_semi_structured

    fours = layer.weight.detach().view(layer.out_features, -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, fours.abs().topk(2, -1).indices, True)
    pruned = (fours * kept).view_as(layer.weight)

    def make() -> Callable[[], Tensor]:
        weight = to_sparse_semi_structured(pruned)
        return lambda: nn.functional.linear(x, weight)

    return rotate(make, pruned.numel() * pruned.element_size() // 2, x.device)


def blksprs_blocks(layer: nn.Linear, x: Tensor) -> list[Callable[[], Tensor]]:
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

    return rotate(make, right.numel() * right.element_size(), x.device)
