"""Rules of operators that act on every element by itself, and of factory functions.

Operands of one size along a dimension share their labels there; an operand that spans the dimension without labels (the network's
input, a position grid) makes it fixed. A function with f(0) != 0 needs no care: channels are zeroed where they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, aligned, rule


def broadcast(trace: Trace, call: Call, operands: list[Tensor], shape: torch.Size) -> dict[int, Array | None]:
    """Labels of the elementwise result of `shape`; labels are joined across operands, or pinned against a fixed one."""
    labels = [trace.of(tensor) for tensor in operands]
    weights = trace.source(*operands) is not None
    dims: dict[int, Array | None] = {}
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        spans = [aligned(known, tensor.shape, dim, len(shape), size) for known, tensor in zip(labels, operands)]
        arrays = [atoms for full, atoms in spans if full]
        if any(atoms is not None for atoms in arrays):
            dims[dim] = trace.merge(arrays, f"meets an operand without channels of its own ({trace.where(call)})")
            if weights:
                trace.atoms.ties += [(arrays[0], other) for other in arrays[1:] if arrays[0] is not None and other is not None]
    return dims


# PyTorch tags most of these itself; 2.11 forgets the activations of the second line, some of them in place only.
@rule("pointwise", "hardswish", "_prelu_kernel", "copy", "native_dropout", "_to_copy", "dropout", "alpha_dropout", "bucketize",
      "leaky_relu", "hardtanh", "hardsigmoid", "elu", "celu", "selu")
def pointwise(trace: Trace, call: Call) -> None:
    """Broadcasting over all tensor arguments."""
    operands = call.tensors()
    sizes = {tensor.shape for tensor in call.outputs()}
    if not sizes:
        return
    if len(sizes) > 1:
        for tensor in operands:
            trace.pin(trace.of(tensor), f"no rule for {trace.where(call)}")
        return
    dims = broadcast(trace, call, operands, sizes.pop())
    source = trace.source(*operands)
    for out in call.outputs():
        trace.set(out, dims, source)


@rule("alias", "detach", "lift_fresh", "lift_fresh_copy", "view_as_real_copy", "contiguous", "positive", "fill", "zero", "bernoulli",
      "uniform", "normal", "random", "exponential", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
      "fill_diagonal", "_conj", "resolve_conj", "resolve_neg")
def same(trace: Trace, call: Call) -> None:
    """The result has the labels of the first argument."""
    operands = call.tensors()
    for out in call.outputs():
        if operands and operands[0].shape == out.shape:
            labels = trace.of(operands[0])
            constant = call.name.endswith("_like") or call.name in ("fill", "zero")
            trace.set(out, labels.dims, labels.source if labels.source is not None or not constant else None)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided",
      "scalar_tensor")
def factory(trace: Trace, call: Call) -> None:
    """A tensor that is the same everywhere: every dimension may follow whatever it meets."""
    for out in call.outputs():
        trace.set(out, {dim: trace.atoms.loose(size) for dim, size in enumerate(out.shape) if size > 1}, "")


@rule("expand")
def expand(trace: Trace, call: Call) -> None:
    """A dimension of size 1 that is repeated is the same everywhere, so it may follow whatever it meets."""
    source, out = call["self"], call.out
    labels, extra = trace.of(source), call.out.dim() - call["self"].dim()
    dims: dict[int, Array | None] = {dim + extra: atoms for dim, atoms in labels.dims.items()}
    for dim, size in enumerate(out.shape):
        if size > 1 and (dim < extra or source.shape[dim - extra] == 1):
            dims[dim] = trace.atoms.loose(size)
    trace.set(out, dims, labels.source)


@rule("glu", "glu_jvp")
def glu(trace: Trace, call: Call) -> None:
    """First half times sigmoid of the second half: the same position of both halves."""
    tensor, dim = call["self"], call["dim"] % call["self"].dim()
    labels = trace.of(tensor)
    dims: dict[int, Array | None] = dict(labels.dims)
    if dim in labels.dims:
        half = len(labels.dims[dim]) // 2
        trace.atoms.join(labels.dims[dim][:half], labels.dims[dim][half:])
        dims[dim] = labels.dims[dim][:half]
    trace.set(call.out, dims, labels.source)


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "logspace")
def grid(trace: Trace, call: Call) -> None:
    """Tensors whose entries differ by position: fixed dimensions."""
