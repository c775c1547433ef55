"""The rule of `aten.convolution`: plain, grouped, depthwise (with multiplier) and transposed.

Weight [c_out, c_in / g, ...], transposed [c_in, c_out / g, ...]. With g > 1 groups every group must lose as many channels as the
others: either the same position in every group (the group count stays), or whole groups (then what a group reads and what it
produces go together, and the module's `groups` follows). Depthwise convolutions know only the second way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, rule
from compress.graph.records import Cost
from compress.graph.rules_linear import contract, produce


@rule("convolution", "_convolution")
def convolution(trace: Trace, call: Call) -> None:
    """Any convolution."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    lx, lw, out = trace.of(x), trace.of(weight), call.out
    where = trace.where(call)
    if lw.source is None:
        for tensor in (x, weight, bias):
            trace.pin(trace.of(tensor), f"convolution with computed weights ({where})")
    for labels in (lx, lw):
        for dim, atoms in labels.dims.items():
            if dim >= 2:
                trace.atoms.pin(atoms, f"is a spatial dimension of a convolution ({where})")
    transposed = call["transposed"]
    if groups == 1:
        inner, outer = (0, 1) if transposed else (1, 0)
        contract(trace, call, (x, lx.dims.get(1)), (weight, lw.dims.get(inner)))
        produce(trace, weight, lw.dims.get(outer))
        channels = lw.dims.get(outer)
    else:
        channels = _grouped(trace, call, x, weight, out, groups, transposed)
    if bias is not None:
        channels = trace.merge([channels, trace.of(bias).dims.get(0)], f"bias of a fixed output ({where})") if out.shape[1] > 1 else None
    places = x.shape[2:] if transposed else out.shape[2:]
    unit = int(np.prod(places)) * int(np.prod(weight.shape[2:]))
    trace.costs.append(Cost(lw.source or "", unit, [lx.dims.get(0, x.shape[0]), *(lw.dims.get(d, weight.shape[d]) for d in (0, 1))]))
    trace.set(out, {0: lx.dims.get(0), 1: channels}, trace.source(x, weight))


def _grouped(trace: Trace, call: Call, x: Tensor, weight: Tensor, out: torch.Tensor, groups: int, transposed: bool) -> Array | None:
    """Joins the atoms of a grouped convolution and returns the labels of its output channels."""
    atoms, lw = trace.atoms, trace.of(weight)
    inputs, outputs = x.shape[1] // groups, out.shape[1] // groups
    xs, w0, w1 = trace.of(x).dims.get(1), lw.dims.get(0), lw.dims.get(1)
    ways = (["position"] if inputs > 1 and outputs > 1 else []) + ["group", "pin"]
    touched = [labels for labels in (xs, w0, w1) if labels is not None]
    own = trace.module(_ConvNd)  # the adapter rewrites its `groups`; a group count that stands in the program is a guess
    way = ways[0] if own is not None and own[1].groups == groups else ways[trace.choose(call, len(ways), touched)]
    if trace.grouped.setdefault(lw.source or "", way) != way:
        way = "pin"
    where = trace.where(call)
    if xs is None or way == "pin":
        for labels in touched:
            atoms.pin(labels, f"grouped convolution {'of a fixed input' if xs is None else 'with a fixed group count'} ({where})")
        if transposed:
            return None if w1 is None else np.tile(w1, groups)
        return w0
    rows = xs.reshape(groups, inputs)
    if way == "position":
        assert w0 is not None and w1 is not None
        atoms.join(rows, rows[:1])
        if transposed:
            atoms.join(xs, w0)
            atoms.contracted.append(w0)
            produce(trace, weight, w1)
            return np.tile(w1, groups)
        atoms.join(rows, w1[None])
        atoms.contracted.append(w1)
        atoms.join(w0.reshape(groups, outputs), w0[:outputs][None])
        produce(trace, weight, w0)
        return w0
    assert w0 is not None
    atoms.join(rows, rows[:, :1])
    atoms.pin(w1, f"is shared by the groups of a convolution that loses whole groups ({where})")
    atoms.join(w0.reshape(groups, -1), rows[:, :1])
    produce(trace, weight, w0)
    return np.repeat(rows[:, 0], outputs)
