"""Low-rank factors of one weight: data, recomposition, balancing and counting. Tensors in, tensors out.

Symbols: weight W [o, c] (linear) or [o, c / groups, kh, kw] (convolution), ranks r_o and r_c per group.
    input  [groups * r_c, c / groups]            reads the layer's input, a 1x1 convolution
    core   [groups * r_o, r_c, kh, kw]           the original kernel on r_c channels ([r_o, r_c] for linear layers)
    output [o, r_o] or [o, r_o, kh, kw]          writes the layer's output, a 1x1 convolution unless the kernel is split in space
Within one group W = output . core . input, contracted over the two ranks; a missing factor is the identity. With `depthwise` the core is
[groups * R, 1, kh, kw] and connects equal indices only: W = sum_r output[:, r] core[r] input[r, :].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import UserError


@dataclass(frozen=True)
class Factors:
    """Factors of one layer; shapes in the module docstring. At least one of the three is present."""

    input: Tensor | None
    core: Tensor | None
    output: Tensor | None
    depthwise: bool = False
    groups: int = 1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors that are present, in the order in which they act."""
        named = {"input": self.input, "core": self.core, "output": self.output}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def parameters(self) -> int:
        """Number of weights in all factors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_o, r_c) per group; equal where one factor is missing between them, the layer's own width where nothing narrows a side."""
        if self.output is not None:
            r_out = self.output.shape[1]
        else:
            r_out = (self.core if self.core is not None else self.input).shape[0] // self.groups
        if self.input is not None:
            r_in = self.input.shape[0] // self.groups
        else:
            r_in = (self.core if self.core is not None else self.output).shape[1]
        return r_out, r_in

    def map(self, function) -> Factors:
        """The same factors with `function` applied to every tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors.items()})

    def split(self) -> list[Factors]:
        """One `Factors` per group."""
        chunks = {name: tensor.chunk(self.groups) for name, tensor in self.tensors.items()}
        empty = dict.fromkeys(("input", "core", "output"))
        return [
            Factors(**(empty | {name: parts[g] for name, parts in chunks.items()}), depthwise=self.depthwise) for g in range(self.groups)
        ]

    @staticmethod
    def join(parts: list[Factors]) -> Factors:
        """Factors of a grouped layer from those of its groups, which must have equal ranks."""
        first = parts[0]
        stacked = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
        return replace(first, **stacked, groups=len(parts))


def composed_shape(factors: Factors) -> tuple[int, ...]:
    """The shape of `recompose(factors)`, from the shapes alone.

    Raises
    ------
    UserError: no factor, or neighbours that do not compose.
    """
    tensors, g = factors.tensors, factors.groups
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not tensors:
        raise UserError("The factors are empty; give at least one of input, core and output.")
    first, last = next(iter(shapes.values())), list(shapes.values())[-1]
    kernels = [shape[2:] for shape in shapes.values() if len(shape) == 4]
    # a kernel split in space: one factor may span an axis, the other is 1 there
    crossed = len(kernels) == 2 and any(min(sizes) > 1 for sizes in zip(*kernels, strict=True))
    dimensions = {"input": (2,), "core": (4,) if factors.depthwise else (2, 4), "output": (2, 4) if len(kernels) == 2 or len(tensors) == 1 else (2,)}
    fits = all(len(shape) in dimensions[name] and min(shape) > 0 and shape[0] % g == 0 for name, shape in shapes.items()) and not crossed
    if fits and factors.depthwise:
        fits = len(tensors) == 3 and shapes["core"][1] == 1 and len(last) == 2 and first[0] == shapes["core"][0] == last[1] * g
    elif fits:
        pairs = zip(list(shapes.values())[:-1], list(shapes.values())[1:], strict=True)
        fits = all(before[0] == after[1] * g for before, after in pairs)
    if not fits:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        form = "depthwise " if factors.depthwise else ""
        raise UserError(f"The {form}factors {found} do not compose in {g} groups; each must read as many channels as the one before it gives.")
    kernel = tuple(max(sizes) for sizes in zip(*kernels, strict=True)) if kernels else ()
    return (last[0], first[1], *kernel)


def recompose(factors: Factors) -> Tensor:
    """The dense weight [o, c / groups] or [o, c / groups, kh, kw] that the factors stand for."""
    if factors.groups > 1:
        return torch.cat([recompose(part) for part in factors.split()])
    left, core, right = factors.output, factors.core, factors.input
    if factors.depthwise:
        return torch.einsum("or,rkl,rc->ockl", left, core.squeeze(1), right)
    weight = core
    if right is not None:
        weight = right if weight is None else torch.einsum("pq...,qc->pc...", weight, right)
    if left is None:
        return weight
    if weight is None:
        return left
    if left.ndim == 4:
        return torch.einsum("opyz,pcyz->ocyz", *_broadcast_space(left, weight))
    return torch.einsum("op,pc...->oc...", left, weight)


def _broadcast_space(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A column kernel [.., kh, 1] and a row kernel [.., 1, kw], both expanded to [.., kh, kw]."""
    size = torch.broadcast_shapes(left.shape[2:], right.shape[2:])
    return left.expand(*left.shape[:2], *size), right.expand(*right.shape[:2], *size)


def orthonormalise(factors: Factors) -> Factors:
    """The same function with orthonormal outer factors (rows of `input`, columns of `output`), the scale moved into the core.

    Two factors have no core to hold the scale: there the product U S V^T is split evenly, `output` = U S^(1/2) and `input` (or the
    core) = S^(1/2) V^T, so that both sides have the same norm. Depthwise and spatially split factors are balanced per component.
    Fine-tuning whitened factors as they come, badly scaled, loses ten points of accuracy and more.
    """
    if factors.groups > 1:
        return Factors.join([orthonormalise(part) for part in factors.split()])
    if factors.depthwise or (factors.output is not None and factors.output.ndim == 4):
        return _balance_components(factors)
    if factors.core is not None and factors.input is not None:
        right, triangle = torch.linalg.qr(factors.input.T)
        core = torch.einsum("pq...,tq->pt...", factors.core, triangle)
        if factors.output is None:
            return replace(factors, input=right.T.contiguous(), core=core)
        left, triangle = torch.linalg.qr(factors.output)
        return replace(factors, input=right.T.contiguous(), core=torch.einsum("tp,pq...->tq...", triangle, core), output=left)
    if len(factors.tensors) < 2:
        return factors
    inner = factors.core if factors.core is not None else factors.input
    left, triangle = torch.linalg.qr(factors.output)
    u, s, v = torch.linalg.svd(triangle @ inner.flatten(1), full_matrices=False)
    rank = inner.shape[0]
    # with r > c k k or r > o the thin product has fewer components than the given rank; the remainder is zero
    u, s, v = (_grow(u, rank, 1), _grow(s, rank, 0), _grow(v, rank, 0))
    scaled = (s.sqrt()[:, None] * v).reshape(inner.shape)
    moved = {"core": scaled} if factors.core is not None else {"input": scaled}
    return replace(factors, output=left @ u * s.sqrt(), **moved)


def _grow(tensor: Tensor, size: int, dim: int) -> Tensor:
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _balance_components(factors: Factors) -> Factors:
    """Every component r has the same norm in each factor that carries it."""
    carriers = {name: (1 if name == "output" else 0) for name in factors.tensors}
    norms = {
        name: torch.linalg.vector_norm(tensor.transpose(0, carriers[name]).flatten(1), dim=1) for name, tensor in factors.tensors.items()
    }
    product = torch.stack(list(norms.values())).prod(0)
    target = product ** (1 / len(norms))
    scaled = {}
    for name, tensor in factors.tensors.items():
        scale = torch.where(product > 0, target / norms[name].clamp_min(torch.finfo(tensor.dtype).tiny), torch.zeros_like(target))
        shape = [1] * tensor.ndim
        shape[carriers[name]] = -1
        scaled[name] = tensor * scale.reshape(shape)
    return replace(factors, **scaled)


def merge_core(factors: Factors) -> Factors:
    """Two factors from the three of a linear layer or 1x1 convolution: the core joins the side with the larger rank.

    The function is unchanged, and r (o + c) at r = min(r_o, r_c) never exceeds r_o o + r_o r_c + r_c c.

    Raises
    ------
    ValueError: the core is larger than 1x1, or a factor is missing.
    """
    core = factors.core
    if core is None or factors.input is None or factors.output is None or core[0, 0].numel() != 1 or factors.depthwise:
        raise ValueError("merge_core expects three factors with a 1x1 core")
    if factors.groups > 1:
        return Factors.join([merge_core(part) for part in factors.split()])
    matrix = core.flatten(1)
    if matrix.shape[0] >= matrix.shape[1]:
        return Factors(factors.input, None, factors.output @ matrix)
    return Factors(matrix @ factors.input, None, factors.output)
