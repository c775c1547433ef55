"""The operator `compress_kernels::two_four_linear` and the packing that feeds it.

On a GPU of capability 8.0 or higher S goes through torch's cuSPARSELt product (bfloat16 and float16, rows and columns multiples of 16; its
algorithm is searched for once) and R through the run16 kernel, which adds it to that product. Everything else multiplies S as a dense matrix:
also float16 with a scale, because cuSPARSELt rounds S x to float16, where the scale could no longer bring back what is beyond its range.
options = (coding of R,), as in run16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import epilogue, operator
from ..formats import Packed
from ..run16.reference import BYTE, stored_bytes
from . import reference

MULTIPLE = 16
BATCH_MULTIPLE = 8
# cuSPARSELt reads 16 bytes at a time.
ALIGNMENT = 16
CAPABILITY = (8, 0)
# Compressed forms of S by its `values` tensor: (state of the tensor, compressed, {batch: algorithm}); dropped with the tensor.
_compressed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def _has_library(device: torch.device) -> bool:
    """Whether torch was built with cuSPARSELt and `device` has sparse tensor cores."""
    library = getattr(torch.backends, "cusparselt", None)
    return library is not None and library.is_available() and torch.cuda.get_device_capability(device) >= CAPABILITY


def usable(x: Tensor, rows: int, columns: int) -> bool:
    """Whether cuSPARSELt takes the product."""
    supported = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _has_library(x.device)
    return supported and rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def _dense_s(values: Tensor, index, rows: int, columns: int) -> Tensor:
    s, _ = reference.parts(values.detach(), index)
    return operator.decode(s, reference.positions_of_s(index[0], rows, columns), rows, columns)


def _state(values: Tensor) -> tuple | None:
    """What changes when `values` does (except through `.data`); None for an inference tensor, which counts no versions."""
    return None if values.is_inference() else (values._version, values.data_ptr(), values.dtype, values.device)


def _compressed_s(values: Tensor, index, rows: int, columns: int, keep: bool) -> tuple[Tensor, dict[int, int]]:
    """S in cuSPARSELt's form and the algorithms found for it by batch; remembered if `keep`."""
    now = _state(values)
    entry = _compressed.get(values)
    if entry is None or now is None or entry[0] != now:
        entry = (now, torch._cslt_compress(_dense_s(values, index, rows, columns)), {} if entry is None or now else entry[2])
        if keep:
            _compressed[values] = entry
    return entry[1], entry[2]


def _sparse_tensor_cores(x: Tensor, values: Tensor, index, rows: int, columns: int) -> Tensor:
    """S x for x [N, columns], as [N, rows]."""
    # What is made while a graph is recorded holds numbers only when that graph runs, and no search can run: neither outlives the call.
    recording = torch.cuda.is_current_stream_capturing()
    compressed, algorithms = _compressed_s(values, index, rows, columns, not recording)
    batch = x.shape[0]
    padded = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE
    x = torch.nn.functional.pad(x, (0, 0, 0, padded - batch)) if padded != batch else operator.aligned(x.contiguous(), ALIGNMENT)
    if padded not in algorithms and not recording:
        algorithms[padded] = torch._cslt_sparse_mm_search(compressed, x.t())
    return torch._cslt_sparse_mm(compressed, x.t(), alg_id=algorithms.get(padded, 0)).t()[:batch]


def _launch(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, options, activation: str) -> Tensor:
    from ..run16.triton import launch

    dtype = operator.wide(x.dtype, scale)
    if dtype == x.dtype and usable(x, rows, columns):
        product = _sparse_tensor_cores(x, values, index, rows, columns)
    else:
        product = x.to(dtype) @ _dense_s(values, index, rows, columns).to(dtype).t()
    _, remainder = reference.parts(values.detach(), index)
    if not remainder.shape[0]:
        return epilogue.finish(product, scale, bias, residual, activation).to(x.dtype).contiguous()
    # The kernel adds what it is given behind its own scale.
    added = epilogue.finish(product, scale, None, residual, "none").contiguous()
    return launch(x, remainder, index[1:], scale, bias, added, rows, columns, (options[0], 0, 0), activation)


two_four_linear = operator.define_linear("two_four_linear", reference.positions, _launch)


def pack(weight: Tensor, mask: Tensor | None = None) -> Packed:
    """Packs `weight` [c_out, c_in], c_in a multiple of 4."""
    values, index = reference.pack(weight, mask)
    kept = int((weight != 0).sum() if mask is None else mask.sum())
    _, remainder = reference.parts(values, index)
    dense_half = weight.numel() // 2 * weight.element_size() + weight.numel() // 8
    return Packed("two_four", values, index, weight.shape[0], weight.shape[1], kept, (BYTE,),
                  dense_half + stored_bytes(remainder, index[1:]))
