"""Rules of operators that contract a dimension: matrix products and embeddings (convolutions: `rules_conv`).

In y[.., o] = sum_i w[o, i] x[.., i] channel i of x and w[:, i] go together; w's second dimension is the place where the channel is
read ("in"), its first dimension names the channels of y ("out"). A contraction of two activations (attention) has no weight whose
slice could be zeroed, so its channels are pinned.
"""

from __future__ import annotations

from torch import Tensor

from compress.graph.labels import Array
from compress.graph.mode import Call, Trace, rule
from compress.graph.records import Cost
from compress.graph.rules_elementwise import broadcast


def contract(trace: Trace, call: Call, first: tuple[Tensor, Array | None], second: tuple[Tensor, Array | None]) -> None:
    """Sums over one dimension of two tensors; each is given with its labels there."""
    (a, la), (b, lb) = first, second
    weight_a, weight_b = trace.of(a).source is not None, trace.of(b).source is not None
    if la is None and lb is None:
        return
    if la is None or lb is None:
        trace.atoms.pin(lb if la is None else la, f"reads an input without channels of its own ({trace.where(call)})")
    elif not (weight_a or weight_b):
        for labels in (la, lb):
            trace.atoms.pin(labels, f"product of two activations ({trace.where(call)})")
    else:
        trace.atoms.join(la, lb)
        trace.atoms.contracted.append(lb if weight_b else la)  # of two products of parameters, zeroing one is enough


def produce(trace: Trace, tensor: Tensor, atoms: Array | None) -> None:
    """Marks the dimension of a weight that names the channels of the result."""
    if atoms is not None and trace.of(tensor).source is not None:
        trace.atoms.produced.append(atoms)


def product(trace: Trace, call: Call, a: Tensor, b: Tensor, out: Tensor, batch: int, transposed: bool = False) -> dict[int, Array | None]:
    """Labels of a @ b with `batch` leading batch dimensions (0 or 1), or of a @ b.T for `transposed`."""
    la, lb = trace.of(a).dims, trace.of(b).dims
    row, inner_a, inner_b, column = batch, batch + 1, batch, batch + 1
    if transposed:
        inner_b, column = column, inner_b
    contract(trace, call, (a, la.get(inner_a)), (b, lb.get(inner_b)))
    produce(trace, a, la.get(row))
    produce(trace, b, lb.get(column))
    dims = {row: la.get(row), batch + 1: lb.get(column)}
    if batch:
        dims[0] = trace.merge([la.get(0), lb.get(0)], f"meets an operand without channels of its own ({trace.where(call)})")
    sizes = [(la.get(dim), a.shape[dim]) for dim in range(a.dim())] + [(lb.get(column), b.shape[column])]
    weight = trace.of(b).source or trace.of(a).source or ""
    trace.costs.append(Cost(weight, 1, [size if labels is None else labels for labels, size in sizes]))
    trace.set(out, dims, trace.source(a, b))
    return dims


@rule("mm", "bmm")
def mm(trace: Trace, call: Call) -> None:
    """[n, k] @ [k, m], batched or not."""
    product(trace, call, call["self"], call["mat2"], call.out, int(call.name == "bmm"))


@rule("addmm", "baddbmm")
def addmm(trace: Trace, call: Call) -> None:
    """self + a @ b."""
    batch = call.name == "baddbmm"
    a, b = call["batch1" if batch else "mat1"], call["batch2" if batch else "mat2"]
    product(trace, call, a, b, call.out, int(batch))
    trace.set(call.out, broadcast(trace, call, [call.out, call["self"]], call.out.shape), trace.source(a, b, call["self"]))


@rule("mv", "addmv")
def mv(trace: Trace, call: Call) -> None:
    """[n, k] @ [k]."""
    matrix, vector = (call["mat"], call["vec"]) if call.name == "addmv" else (call["self"], call["vec"])
    lm, lv = trace.of(matrix).dims, trace.of(vector).dims
    contract(trace, call, (matrix, lm.get(1)), (vector, lv.get(0)))
    produce(trace, matrix, lm.get(0))
    trace.set(call.out, {0: lm.get(0)}, trace.source(matrix, vector))
    if call.name == "addmv":
        trace.set(call.out, broadcast(trace, call, [call.out, call["self"]], call.out.shape), trace.source(matrix, vector, call["self"]))


@rule("linear")
def linear(trace: Trace, call: Call) -> None:
    """x @ w.T + b over the last dimension."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    lx, lw = trace.of(x).dims, trace.of(weight).dims
    last = x.dim() - 1
    contract(trace, call, (x, lx.get(last)), (weight, lw.get(1)))
    produce(trace, weight, lw.get(0))
    rows = [lx.get(dim, x.shape[dim]) for dim in range(last)]
    trace.costs.append(Cost(trace.of(weight).source or "", 1, [*rows, lw.get(0, weight.shape[0]), lw.get(1, weight.shape[1])]))
    trace.set(call.out, {**lx, last: lw.get(0)}, trace.source(x, weight))
    if bias is not None:
        trace.set(call.out, broadcast(trace, call, [call.out, bias], call.out.shape), trace.source(x, weight, bias))


@rule("embedding")
def embedding(trace: Trace, call: Call) -> None:
    """Row look-up: the table's columns are the channels, its rows are the vocabulary."""
    weight, indices = call["weight"], call["indices"]
    labels = trace.of(weight).dims
    trace.atoms.pin(labels.get(0), f"rows are looked up by the data ({trace.where(call)})")
    trace.pin(trace.of(indices), f"rows are looked up by the data ({trace.where(call)})")
    produce(trace, weight, labels.get(1))
    trace.set(call.out, {call.out.dim() - 1: labels.get(1)})
