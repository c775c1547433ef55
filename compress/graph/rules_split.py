"""Rules of operators whose constants may or may not follow the width: views, slices, splits, rolls.

`view(b, g, c // g, h, w)` follows a smaller c, `view(b, 4, 8, h, w)` does not, and the recorded call is the same. Each such place is a
guess (`Trace.choose`): the reading that lets most channels go first, then narrower ones, at last a pin. `compress.graph.probe` tries
the guesses on real numbers and moves on to the next reading where one fails.
"""

from __future__ import annotations

import numpy as np

from compress.graph.adapters import slice_attribute
from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, constant_rows, rule
from compress.graph.records import Count


def regroup(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of two shapes with the same number of elements each (dimensions of size 1 are left out)."""
    groups, i, j = [], 0, 0
    left, right = [d for d, size in enumerate(before) if size != 1], [d for d, size in enumerate(after) if size != 1]
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, ins, i = a * before[left[i]], [*ins, left[i]], i + 1
            else:
                b, outs, j = b * after[right[j]], [*outs, right[j]], j + 1
        groups.append((ins, outs))
    return groups


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def view(trace: Trace, call: Call) -> None:
    """Dimensions merged (labels repeat) and split (positions or rows go together)."""
    tensor, out = call["self"], call.out
    labels = trace.of(tensor)
    dims: dict[int, Array | None] = {}
    if labels.dims and out.numel():
        for ins, outs in regroup(tuple(tensor.shape), tuple(out.shape)):
            before, after = [tensor.shape[dim] for dim in ins], [out.shape[dim] for dim in outs]
            for dim in ins:
                if dim in labels.dims:
                    at, atoms = _through(trace, call, labels.dims[dim], ins.index(dim), before, after)
                    if atoms is None:
                        continue
                    dims[outs[at]] = _one_of(trace, call, dims.get(outs[at]), atoms)
    trace.set(out, dims, labels.source)


def _one_of(trace: Trace, call: Call, first: Array | None, second: Array) -> Array:
    """The labels of a dimension that two labelled dimensions were merged into; constants give way."""
    if first is None:
        return second
    reason = f"two labelled dimensions are merged ({trace.where(call)})"
    for one, other in ((first, second), (second, first)):
        if trace.atoms.is_loose(one):
            trace.atoms.pin(one, reason)
            return other
    trace.atoms.pin(first, reason)
    trace.atoms.pin(second, reason)
    return second


def _through(trace: Trace, call: Call, atoms: Array, at: int, before: list[int], after: list[int]) -> tuple[int, Array | None]:
    """Where the labels of dimension `at` of a run of dimensions come out, and which they are there."""
    if len(before) == len(after) == 1:
        return 0, atoms
    spread = [1] * len(before)
    spread[at] = -1
    full = np.broadcast_to(atoms.reshape(spread), before).reshape(after)
    varying = [axis for axis in range(len(after)) if not constant_rows(full, axis)]
    if len(varying) > 1:
        options = [varying[-1], *varying[:-1]]
        choice = trace.choose(call, len(options) + 1, [atoms])
        if choice == len(options):
            trace.atoms.pin(atoms, f"split by fixed numbers ({trace.where(call)})")
            return 0, None
        axis = options[choice]
        rows = np.moveaxis(full, axis, -1).reshape(-1, after[axis])
        trace.atoms.join(rows, rows[:1])
        return axis, rows[0]
    axis = varying[0] if varying else 0
    return axis, np.moveaxis(full, axis, -1).reshape(-1, after[axis])[0]


def _pieces(trace: Trace, atoms: Array, size: int) -> None:
    rows = atoms.reshape(-1, size)
    trace.atoms.join(rows, rows[:1])


@rule("slice", "narrow")
def slice_(trace: Trace, call: Call) -> None:
    """`x[:, start:end:step]` along a labelled dimension.

    Readings: a bound that an adapter's attribute holds follows it; an equal piece of the whole (`chunk`); fixed numbers; pinned.
    """
    tensor, out = call["self"], call.out
    labels, dim, n = trace.of(tensor), call["dim"] % tensor.dim(), tensor.shape[call["dim"] % tensor.dim()]
    dims: dict[int, Array | None] = dict(labels.dims)
    atoms = labels.dims.get(dim)
    if atoms is not None and out.shape[dim] != n:
        start, end, step = call["start"] or 0, n if call["end"] is None else call["end"], call["step"]
        from_back = start < 0
        start, end = max(start + n, 0) if start < 0 else min(start, n), max(end + n, 0) if end < 0 else min(end, n)
        dims[dim] = atoms[start:end:step]
        bounds = [bound for bound in (start, end) if 0 < bound < n]
        targets = [slice_attribute(trace.stack, bound) for bound in bounds]
        size = end - start
        if all(target is not None for target in targets) and step == 1:
            trace.counts += [Count(*target, atoms[:bound]) for target, bound in zip(targets, bounds) if target is not None]
        elif step != 1 or size <= 0:
            trace.atoms.pin(atoms, f"strided slice ({trace.where(call)})")
        else:
            equal = n % size == 0 and start % size == 0 and n // size <= 4
            choice = trace.choose(call, 3 if equal else 2, [atoms]) + (not equal)
            if choice == 0:
                _pieces(trace, atoms, size)
            elif choice == 2:
                trace.atoms.pin(atoms, f"slice by fixed numbers ({trace.where(call)})")
            else:
                fixed = atoms[start:] if from_back else atoms[:end] if end < n else atoms[:start]
                trace.atoms.pin(fixed, f"slice by fixed numbers ({trace.where(call)})")
    trace.set(out, dims, labels.source)


@rule("select")
def select(trace: Trace, call: Call) -> None:
    """`x[:, i]`: the index is a constant, so that nothing in front of it may go (behind it, counted from the back)."""
    tensor, index = call["self"], call["index"]
    labels, dim = trace.of(tensor), call["dim"] % tensor.dim()
    atoms = labels.dims.get(dim)
    if atoms is not None:
        trace.choose(call, 1, [atoms])
        trace.atoms.pin(atoms[:index + 1] if index >= 0 else atoms[index:], f"one index is taken ({trace.where(call)})")
    trace.set(call.out, {other - (other > dim): known for other, known in labels.dims.items() if other != dim}, labels.source)


@rule("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "split_copy")
def split(trace: Trace, call: Call) -> None:
    """Pieces along a dimension. Equal pieces: the same position of every piece goes together."""
    tensor = call["self"]
    labels, dim = trace.of(tensor), call["dim"] % tensor.dim()
    atoms, sizes = labels.dims.get(dim), [piece.shape[call["dim"] % tensor.dim()] for piece in call.out]
    if atoms is not None and len(sizes) > 1:
        equal = len(set(sizes)) == 1 and sizes[0] > 1
        choice = trace.choose(call, 3 if equal else 2, [atoms]) + (not equal)
        if choice == 0:
            _pieces(trace, atoms, sizes[0])
        elif choice == 1 and "with_sizes" not in call.name:
            trace.atoms.pin(atoms[:len(atoms) - sizes[-1]], f"split by fixed numbers ({trace.where(call)})")
        else:
            trace.atoms.pin(atoms, f"split by fixed numbers ({trace.where(call)})")
    start = 0
    for piece, size in zip(call.out, sizes):
        own = None if atoms is None else atoms[start:start + size]
        trace.set(piece, {**labels.dims, dim: own}, labels.source)
        start += size


@rule("unbind")
def unbind(trace: Trace, call: Call) -> None:
    """One tensor per index: their number is part of the program."""
    labels, dim = trace.of(call["self"]), call["dim"] % call["self"].dim()
    trace.atoms.pin(labels.dims.get(dim), f"taken apart index by index ({trace.where(call)})")
    for piece in call.out:
        trace.set(piece, {other - (other > dim): atoms for other, atoms in labels.dims.items() if other != dim}, labels.source)


@rule("roll")
def roll(trace: Trace, call: Call) -> None:
    """Cyclic shift: what wraps around is a fixed number of channels."""
    tensor, shifts, wanted = call["self"], call["shifts"], call["dims"]
    labels = trace.of(tensor)
    dims: dict[int, Array | None] = dict(labels.dims)
    if not wanted:
        trace.pin(labels, f"roll over all dimensions ({trace.where(call)})")
        dims = {}
    for shift, dim in zip(shifts if wanted else [], (d % tensor.dim() for d in wanted)):
        atoms = dims.get(dim)
        if atoms is not None and shift % len(atoms):
            choice = trace.choose(call, 2, [atoms])
            wrapped = atoms[-(shift % len(atoms)):] if shift > 0 else atoms[:-shift]
            trace.atoms.pin(atoms if choice or abs(shift) >= len(atoms) else wrapped, f"rolled by a fixed number ({trace.where(call)})")
            dims[dim] = np.roll(atoms, shift)
    trace.set(call.out, dims, labels.source)
