"""Rules of operators that move indices without mixing them: transpositions, joins of tensors, padding, repetition, shuffles."""

from __future__ import annotations

import numpy as np

from compress.graph.adapters import padding_attributes
from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, rule
from compress.graph.records import Count


@rule("permute")
def permute(trace: Trace, call: Call) -> None:
    """Dimensions reordered."""
    labels, order = trace.of(call["self"]), call["dims"]
    trace.set(call.out, {new: labels.dims.get(old % len(order)) for new, old in enumerate(order)}, labels.source)


@rule("transpose", "t", "swapaxes")
def transpose(trace: Trace, call: Call) -> None:
    """Two dimensions exchanged."""
    tensor = call["self"]
    labels, ndim = trace.of(tensor), tensor.dim()
    a, b = (call["dim0"] % ndim, call["dim1"] % ndim) if call.has("dim0") else (0, ndim - 1)
    swap = {a: b, b: a}
    trace.set(call.out, {swap.get(dim, dim): atoms for dim, atoms in labels.dims.items()}, labels.source)


@rule("unsqueeze")
def unsqueeze(trace: Trace, call: Call) -> None:
    """A dimension of size 1 inserted."""
    labels, at = trace.of(call["self"]), call["dim"] % call.out.dim()
    trace.set(call.out, {dim + (dim >= at): atoms for dim, atoms in labels.dims.items()}, labels.source)


@rule("squeeze")
def squeeze(trace: Trace, call: Call) -> None:
    """Dimensions of size 1 removed."""
    tensor = call["self"]
    if call.has("dim"):
        given = call["dim"]
        wanted = {dim % max(tensor.dim(), 1) for dim in ([given] if isinstance(given, int) else given)}
    else:
        wanted = set(range(tensor.dim()))
    kept = [dim for dim in range(tensor.dim()) if not (dim in wanted and tensor.shape[dim] == 1)]
    labels = trace.of(tensor)
    trace.set(call.out, {new: labels.dims.get(old) for new, old in enumerate(kept)}, labels.source)


@rule("cat", "concat")
def cat(trace: Trace, call: Call) -> None:
    """Tensors one after the other along `dim`."""
    tensors = [tensor for tensor in call["tensors"] if tensor.dim() == call.out.dim()]
    ndim, at = call.out.dim(), call["dim"] % call.out.dim()
    labels, where = [trace.of(tensor) for tensor in tensors], trace.where(call)
    dims: dict[int, Array | None] = {}
    for dim in range(ndim):
        arrays = [known.dims.get(dim) for known in labels]
        if all(atoms is None for atoms in arrays):
            continue
        if dim != at:
            dims[dim] = trace.merge(arrays, f"meets an operand without channels of its own ({where})")
            continue
        parts = []
        for tensor, atoms in zip(tensors, arrays):
            if atoms is None:
                atoms = trace.atoms.new(tensor.shape[dim])
                trace.atoms.pin(atoms, f"joined from a fixed operand ({where})")
            parts.append(atoms)
        dims[dim] = np.concatenate(parts)
    trace.set(call.out, dims, trace.source(*tensors))


@rule("stack")
def stack(trace: Trace, call: Call) -> None:
    """Tensors one behind the other along a new dimension."""
    tensors, at = call["tensors"], call["dim"] % call.out.dim()
    labels = [trace.of(tensor) for tensor in tensors]
    dims: dict[int, Array | None] = {}
    for dim in range(tensors[0].dim()):
        arrays = [known.dims.get(dim) for known in labels]
        if any(atoms is not None for atoms in arrays):
            dims[dim + (dim >= at)] = trace.merge(arrays, f"meets an operand without channels of its own ({trace.where(call)})")
    trace.set(call.out, dims, trace.source(*tensors))


@rule("constant_pad_nd")
def pad(trace: Trace, call: Call) -> None:
    """Constants in front of and behind a dimension; a negative amount crops.

    The constants are channels that nobody computes: they may go where the module that pads keeps their number in an attribute, and
    stay where the number stands in the program.
    """
    tensor, amounts = call["self"], call["pad"]
    labels = trace.of(tensor)
    dims: dict[int, Array | None] = dict(labels.dims)
    for pair in range(len(amounts) // 2):
        dim, front, back = tensor.dim() - 1 - pair, amounts[2 * pair], amounts[2 * pair + 1]
        if dim not in dims or (front, back) == (0, 0):
            continue
        atoms = labels.dims[dim]
        trace.atoms.pin(atoms[:max(-front, 0)], f"cropped by a fixed number ({trace.where(call)})")
        trace.atoms.pin(atoms[len(atoms) - max(-back, 0):], f"cropped by a fixed number ({trace.where(call)})")
        inside = atoms[max(-front, 0):len(atoms) - max(-back, 0)]
        ends = [trace.atoms.new(max(front, 0)), trace.atoms.new(max(back, 0))]
        attributes = padding_attributes(trace.stack, front, back)
        for new, target in zip(ends, attributes or (None, None)):
            if target is None:
                trace.atoms.pin(new, f"padded by a fixed number ({trace.where(call)})")
            else:
                trace.counts.append(Count(*target, new))
        dims[dim] = np.concatenate([ends[0], inside, ends[1]])
    trace.set(call.out, dims, labels.source)


@rule("flip")
def flip(trace: Trace, call: Call) -> None:
    """Order reversed along some dimensions."""
    labels = trace.of(call["self"])
    turned = {dim % call.out.dim() for dim in call["dims"]}
    trace.set(call.out, {dim: atoms[::-1].copy() if dim in turned else atoms for dim, atoms in labels.dims.items()}, labels.source)


@rule("repeat")
def repeat(trace: Trace, call: Call) -> None:
    """Copies one after the other; a repeated dimension of size 1 may follow whatever it meets."""
    tensor, times = call["self"], call["repeats"]
    labels, extra = trace.of(tensor), len(times) - tensor.dim()
    dims: dict[int, Array | None] = {}
    for dim, count in enumerate(times):
        size = tensor.shape[dim - extra] if dim >= extra else 1
        if size == 1 and count > 1:
            dims[dim] = trace.atoms.loose(count)
        elif dim >= extra and dim - extra in labels.dims:
            dims[dim] = np.tile(labels.dims[dim - extra], count)
    trace.set(call.out, dims, labels.source)


def _blocks(trace: Trace, atoms: Array, size: int) -> Array:
    """Joins every `size` neighbours and returns one label per block."""
    rows = atoms.reshape(-1, size)
    trace.atoms.join(rows, rows[:, :1])
    return rows[:, 0]


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(trace: Trace, call: Call) -> None:
    """[c r^2, h, w] <-> [c, h r, w r]: the r^2 channels of a block go together."""
    labels, at = trace.of(call["self"]), call.out.dim() - 3
    factor = call["upscale_factor" if call.name == "pixel_shuffle" else "downscale_factor"] ** 2
    dims: dict[int, Array | None] = {dim: atoms for dim, atoms in labels.dims.items() if dim < at}
    for dim in (at + 1, at + 2):
        trace.atoms.pin(labels.dims.get(dim), f"is a spatial dimension ({trace.where(call)})")
    channels = labels.dims.get(at)
    if channels is not None:
        dims[at] = _blocks(trace, channels, factor) if call.name == "pixel_shuffle" else np.repeat(channels, factor)
    trace.set(call.out, dims, labels.source)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, call: Call) -> None:
    """[g, c] -> [c, g]: the same position of every group goes together, and the group count stays."""
    labels, groups = trace.of(call["self"]), call["groups"]
    dims: dict[int, Array | None] = dict(labels.dims)
    if 1 in dims:
        rows = labels.dims[1].reshape(groups, -1)
        trace.atoms.join(rows, rows[:1])
        dims[1] = np.repeat(rows[0], groups)
    trace.set(call.out, dims, labels.source)


@rule("im2col", "col2im")
def im2col(trace: Trace, call: Call) -> None:
    """[c, h, w] <-> [c k, places]: the k values of a channel go together."""
    tensor = call["self"]
    labels, size = trace.of(tensor), int(np.prod(call["kernel_size"]))
    at = tensor.dim() - (3 if call.name == "im2col" else 2)
    for dim, atoms in labels.dims.items():
        if dim > at:
            trace.atoms.pin(atoms, f"is a spatial dimension ({trace.where(call)})")
    dims: dict[int, Array | None] = {dim: atoms for dim, atoms in labels.dims.items() if dim < at}
    if at in labels.dims:
        dims[at] = np.repeat(labels.dims[at], size) if call.name == "im2col" else _blocks(trace, labels.dims[at], size)
    trace.set(call.out, dims, labels.source)
