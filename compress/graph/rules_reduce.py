"""Rules of operators that look at a whole dimension: reductions, softmax, normalisation, pooling, resizing, look-ups.

A dimension whose entries are mixed (summed, normalised together, sorted) is pinned; the other dimensions pass. Batch normalisation in
evaluation and instance normalisation act per channel. Group normalisation loses whole groups, which leaves the statistics of the
others as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, rule
from compress.graph.records import Cost, Count
from compress.graph.rules_elementwise import pointwise


@rule("mean", "sum", "prod", "amax", "amin", "max", "min", "aminmax", "argmax", "argmin", "any", "all", "std", "var", "var_mean",
      "std_mean", "logsumexp", "linalg_vector_norm", "norm", "median", "nanmean", "nansum", "mode", "count_nonzero")
def reduce(trace: Trace, call: Call) -> None:
    """Reduced dimensions are mixed, the others pass."""
    if call.has("other"):
        pointwise(trace, call)
        return
    tensor = call["self"]
    labels, ndim = trace.of(tensor), tensor.dim()
    given = call["dim"] if call.has("dim") else None
    named = range(ndim) if given is None or given == [] else [given] if isinstance(given, int) else given
    reduced = {dim % max(ndim, 1) for dim in named}
    for dim in reduced:
        trace.atoms.pin(labels.dims.get(dim), f"mixes the channels ({trace.where(call)})")
    keep = bool(call["keepdim"]) if call.has("keepdim") else False
    left = [dim for dim in range(ndim) if keep or dim not in reduced]
    for out in call.outputs():
        trace.set(out, {new: labels.dims.get(old) for new, old in enumerate(left) if old not in reduced}, labels.source)


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "cummax", "cummin",
      "kthvalue")
def mix(trace: Trace, call: Call) -> None:
    """Entries along `dim` depend on each other."""
    tensor = call["self"]
    labels, dim = trace.of(tensor), call["dim"] % max(tensor.dim(), 1)
    trace.atoms.pin(labels.dims.get(dim), f"mixes the channels ({trace.where(call)})")
    for out in call.outputs():
        if out.dim() == tensor.dim():
            kept = {other: atoms for other, atoms in labels.dims.items() if other != dim or out.shape[dim] == len(atoms)}
            trace.set(out, kept, labels.source)


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_batch_norm_with_update", "batch_norm")
def batch_norm(trace: Trace, call: Call) -> None:
    """Per channel: the parameters and running statistics belong to dimension 1 of the input."""
    x = call["input"]
    labels = trace.of(x)
    vectors = [call[name] for name in ("weight", "bias", "running_mean", "running_var") if call.has(name)]
    if x.shape[1] > 1:
        arrays = [labels.dims.get(1), *(trace.of(vector).dims.get(0) for vector in vectors if vector is not None)]
        trace.merge(arrays, f"normalises an input without channels of its own ({trace.where(call)})")
    outputs = call.outputs()
    trace.set(outputs[0], labels.dims)
    for extra in outputs[1:]:
        if extra.dim() == 1 and extra.shape[0] == x.shape[1]:
            trace.set(extra, {0: labels.dims.get(1)})


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(trace: Trace, call: Call) -> None:
    """g v / |v|, the norm over every dimension but `dim`."""
    v, g, kept = call["v"], call["g"], call["dim"] % call["v"].dim()
    lv, lg = trace.of(v), trace.of(g)
    for dim, atoms in lv.dims.items():
        if dim != kept:
            trace.atoms.pin(atoms, f"normalised over its channels ({trace.where(call)})")
    reason = f"meets an operand without channels of its own ({trace.where(call)})"
    own = trace.merge([lv.dims.get(kept), lg.dims.get(kept)], reason) if v.shape[kept] > 1 else None
    trace.set(call.outputs()[0], {**lv.dims, kept: own}, trace.source(v, g))


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(trace: Trace, call: Call) -> None:
    """The normalised dimensions are mixed."""
    x = call["input"]
    labels, first = trace.of(x), x.dim() - len(call["normalized_shape"])
    reason = f"normalised over its channels ({trace.where(call)})"
    for dim, atoms in labels.dims.items():
        if dim >= first:
            trace.atoms.pin(atoms, reason)
    for name in ("weight", "bias"):
        if call.has(name) and call[name] is not None:
            trace.pin(trace.of(call[name]), reason)
    trace.set(call.outputs()[0], labels.dims)


@rule("native_group_norm")
def group_norm(trace: Trace, call: Call) -> None:
    """Whole groups may go; the module's `num_groups` and `num_channels` follow."""
    x, groups = call["input"], call["group"]
    labels = trace.of(x)
    vectors = [call[name] for name in ("weight", "bias") if call[name] is not None]
    atoms = labels.dims.get(1)
    if x.shape[1] > 1:
        reason = f"normalises an input without channels of its own ({trace.where(call)})"
        atoms = trace.merge([atoms, *(trace.of(vector).dims.get(0) for vector in vectors)], reason)
    module = trace.module(nn.GroupNorm)
    if atoms is not None:
        rows = atoms.reshape(groups, -1)
        if groups == 1 or module is None:
            trace.atoms.pin(atoms, f"normalised over its channels ({trace.where(call)})")
        else:
            trace.atoms.join(rows, rows[:, :1])
            trace.counts += [Count(module[0], "num_groups", rows[:, 0]), Count(module[0], "num_channels", atoms)]
    for dim, other in labels.dims.items():
        if dim >= 2:
            trace.atoms.pin(other, f"normalised over its positions ({trace.where(call)})")
    trace.set(call.outputs()[0], labels.dims)


def _spatial(name: str) -> int:
    return next(int(digit) for digit in "321" if f"{digit}d" in name)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool3d",
      "max_pool1d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "mkldnn_max_pool2d", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_max_pool1d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d",
      "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
      "grid_sampler_3d", "max_unpool2d", "max_unpool3d", "fractional_max_pool2d")
def pool(trace: Trace, call: Call) -> None:
    """Channels pass, the last one to three dimensions are spatial."""
    tensors = call.tensors()
    tensor = tensors[0]
    labels = trace.of(tensor)
    space = tensor.dim() - _spatial(call.name)
    for dim, atoms in labels.dims.items():
        if dim >= space:
            trace.atoms.pin(atoms, f"is a spatial dimension ({trace.where(call)})")
    if call.name.startswith(("grid_sampler", "max_unpool")):
        for other in tensors[1:]:
            trace.pin(trace.of(other), f"is a list of positions ({trace.where(call)})")
    for out in call.outputs():
        trace.set(out, {dim: atoms for dim, atoms in labels.dims.items() if dim < space})


def _lookup(trace: Trace, call: Call, tensor: Tensor, at: int, index: Tensor) -> None:
    """`tensor` indexed along one dimension by an integer tensor: that dimension is pinned, the others pass."""
    labels, extra = trace.of(tensor), index.dim() - 1
    reason = f"indexed by numbers that surgery does not rewrite ({trace.where(call)})"
    trace.atoms.pin(labels.dims.get(at), reason)
    trace.pin(trace.of(index), reason)
    dims: dict[int, Array | None] = {dim + (extra if dim > at else 0): atoms for dim, atoms in labels.dims.items() if dim != at}
    trace.set(call.out, dims, labels.source)


@rule("index_select")
def index_select(trace: Trace, call: Call) -> None:
    """Rows by number."""
    tensor = call["self"]
    _lookup(trace, call, tensor, call["dim"] % max(tensor.dim(), 1), call["index"])


@rule("index")
def index(trace: Trace, call: Call) -> None:
    """`x[:, table]` with one index passes the other dimensions; anything else pins."""
    tensor, given = call["self"], call["indices"]
    used = [dim for dim, entry in enumerate(given) if entry is not None]
    if len(used) == 1 and given[used[0]].dtype not in (torch.bool, torch.uint8):
        _lookup(trace, call, tensor, used[0], given[used[0]])
        return
    for other in call.tensors():
        trace.pin(trace.of(other), f"indexed by numbers that surgery does not rewrite ({trace.where(call)})")


@rule("unfold")
def unfold(trace: Trace, call: Call) -> None:
    """Windows along one dimension."""
    tensor = call["self"]
    labels, dim = trace.of(tensor), call["dimension"] % tensor.dim()
    trace.atoms.pin(labels.dims.get(dim), f"cut into windows ({trace.where(call)})")
    trace.set(call.out, {other: atoms for other, atoms in labels.dims.items() if other != dim}, labels.source)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable")
def attention(trace: Trace, call: Call) -> None:
    """Fused attention: a product of activations."""
    for tensor in call.tensors():
        trace.pin(trace.of(tensor), f"product of two activations ({trace.where(call)})")
    query, key, value = (call[name] for name in ("query", "key", "value"))
    lead = query.shape[:-2].numel() * query.shape[-2] * key.shape[-2]
    trace.costs.append(Cost("", lead * (query.shape[-1] + value.shape[-1]), []))
