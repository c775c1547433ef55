"""The sparse products that exist, as rivals of this project's kernels: torch CSR, BSR and 2:4, blksprs.

Each function gives calls of one product on as many copies of its weight as the cold-cache rule needs (`_sides.copies`), and the bytes
of the weight that one call reads. A rival with settings is tuned as this project's kernels are (`_sides.fastest`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._sides import Side, copies, fastest, size

BLOCK = 64
BSR_COLUMNS = 16
BSR_SETTINGS = [{"SPLIT_N": n, "GROUP_SIZE_ROW": 4, "num_warps": w, "num_stages": s} for n in (1, 2, 4, 8) for w in (4, 8) for s in (1, 3)]


def dense(layer: nn.Module, x: Tensor) -> Side:
    """The dense layer; only its weight is copied."""
    def call(weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.functional.linear(x, weight, layer.bias)

    return _side(layer.weight.detach().clone, call, size([layer.weight]), x)


def _side(make: Callable[[], object], call: Callable[[object], Tensor], weight_bytes: int, x: Tensor) -> Side:
    """A side of `call` on copies of what `make` gives."""
    return Side([functools.partial(call, made) for made in copies(make, weight_bytes, x.device)], weight_bytes)


def torch_csr(layer: nn.Linear, x: Tensor, expected: Tensor, seconds: float) -> Side:
    """CSR with 32-bit and with 64-bit indices, x row by row, column by column or, if it is one column, as a vector: whichever is fastest."""
    wide = layer.weight.detach().to_sparse_csr()
    narrow = torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), wide.shape)
    by_rows = x.t().contiguous()
    products = {"x by rows": lambda weight: (weight @ by_rows).t(), "x by columns": lambda weight: (weight @ x.t()).t()}
    if x.shape[0] == 1:
        products["x as a vector"] = lambda weight: (weight @ x[0])[None]
    sides = {}
    for indices, matrix in (("32-bit indices", narrow), ("64-bit indices", wide)):
        bytes_each = size((matrix.values(), matrix.col_indices(), matrix.crow_indices()))
        weights = copies(matrix.clone, bytes_each, x.device)
        for name, product in products.items():
            sides[f"{indices}, {name}"] = Side([functools.partial(product, weight) for weight in weights], bytes_each)
    return fastest(sides, expected, seconds)


def torch_bsr(layer: nn.Linear, x: Tensor, settings: list[dict | None]) -> dict[str, Side]:
    """Sides of the block-sparse product with these settings (None for torch's own) on the same copies."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    bsr = layer.weight.detach().to_sparse_bsr((BLOCK, BLOCK))
    columns = x.shape[0]
    # The kernel takes at least 16 columns.
    transposed = nn.functional.pad(x.t(), (0, max(0, BSR_COLUMNS - columns))).contiguous()
    target = x.new_zeros(layer.out_features, transposed.shape[1])
    bytes_each = size((bsr.values(), bsr.col_indices(), bsr.crow_indices()))
    weights = copies(bsr.clone, bytes_each, x.device)

    def call(meta: dict | None, weight: Tensor) -> Tensor:
        return bsr_dense_addmm(target, weight, transposed, beta=0, meta=meta).t()[:columns]

    return {_name(meta): Side([functools.partial(call, meta, weight) for weight in weights], bytes_each) for meta in settings}


def _name(settings: dict | None) -> str:
    return "own choice" if settings is None else ", ".join(f"{name} {value}" for name, value in settings.items())


def default_bsr(layer: nn.Linear, x: Tensor) -> Side:
    """torch's block-sparse product with the settings that torch chooses."""
    return next(iter(torch_bsr(layer, x, [None]).values()))


def tuned_bsr(layer: nn.Linear, x: Tensor, expected: Tensor, seconds: float) -> Side:
    """The fastest of a small sweep of settings, so that the rival is no straw man."""
    return fastest(torch_bsr(layer, x, [None, *BSR_SETTINGS]), expected, seconds)


def torch_two_four(layer: nn.Linear, x: Tensor, seconds: float) -> Side:
    """torch's 2:4 tensor of the two largest of every four: another matrix than the masked one, so it must give its own product."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

    fours = layer.weight.detach().view(layer.out_features, -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, fours.abs().topk(2, -1).indices, True)
    pruned = (fours * kept).view_as(layer.weight)
    sample = to_sparse_semi_structured(pruned)
    algorithms = [0]
    # Without cuSPARSELt the tensor belongs to CUTLASS, which has no algorithms to choose from.
    if isinstance(sample, SparseSemiStructuredTensorCUSPARSELT):
        algorithms += _algorithms(sample, x)
    bytes_each = size([pruned]) * 9 // 16
    weights = copies(lambda: to_sparse_semi_structured(pruned), bytes_each, x.device)

    def call(algorithm: int, weight: Tensor) -> Tensor:
        weight.alg_id_cusparselt = algorithm
        return nn.functional.linear(x, weight)

    sides = {f"algorithm {a}": Side([functools.partial(call, a, weight) for weight in weights], bytes_each) for a in dict.fromkeys(algorithms)}
    expected = x.double() @ pruned.double().t()
    side = fastest(sides, expected, seconds)
    return Side(side.calls, side.weight_bytes, expected, side.facts)


def _algorithms(sample: Tensor, x: Tensor) -> list[int]:
    """cuSPARSELt's own search on x padded as torch pads it; depending on its release torch asks for the result as it is or transposed."""
    padded = nn.functional.pad(x, (0, 0, 0, -x.shape[0] % sample._DTYPE_SHAPE_CONSTRAINTS[x.dtype].dense_min_rows))
    return [torch._cslt_sparse_mm_search(sample.packed, padded.t(), transpose_result=transposed) for transposed in (False, True)]


def blksprs_blocks(layer: nn.Linear, x: Tensor) -> Side:
    """blksprs: dense x (as one full block matrix) times the block-sparse transposed weight.

    A product without a cache of its indices, or with validation, waits for the GPU, which no graph can record.
    """
    import blksprs as bs

    bs.utils.enable_validation()
    weight = layer.weight.detach().t().contiguous()[None]
    rows = -(-x.shape[0] // BLOCK) * BLOCK
    padded = nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))[None].contiguous()
    full = torch.ones(1, rows // BLOCK, x.shape[1] // BLOCK, dtype=torch.bool, device=x.device)
    layout = weight.view(1, weight.shape[1] // BLOCK, BLOCK, weight.shape[2] // BLOCK, BLOCK).any(4).any(2)
    out = torch.ones(1, rows // BLOCK, weight.shape[2] // BLOCK, dtype=torch.bool, device=x.device)
    left = bs.ops.to_sparse(padded, full, BLOCK)
    right = bs.ops.to_sparse(weight, layout, BLOCK)

    def product(stored: Tensor, cache: dict) -> Tensor:
        blocks = bs.ops.matmul(left, full, stored, layout, out, BLOCK, layout_cache=cache)
        return bs.ops.to_dense(blocks, out, BLOCK, layout_cache=cache)[0, : x.shape[0]]

    # Its kernels are tuned once for a block size whatever the shape; forgotten, they are tuned for this one.
    for module, kernel in (("matmul", "matmul_kernel"), ("conversion", "to_dense_kernel")):
        getattr(importlib.import_module(f"blksprs.ops.{module}"), kernel).cache.clear()
    # Once with validation, which is about the operands and not about a copy.
    product(right, {})
    bs.utils.disable_validation()

    def make() -> tuple[Tensor, dict]:
        made: tuple[Tensor, dict] = right.clone(), {}
        product(*made)
        return made

    # The kernel reads one 64-bit number for every block of the dense weight, absent ones included.
    return _side(make, lambda made: product(*made), size([right]) + 8 * layout.numel(), x)
