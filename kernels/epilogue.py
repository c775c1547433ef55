"""What every sparse operator does to its product before writing it: y = act(scale * (W x) + bias + residual).

scale, bias: [c_out], one number per output row; residual: the shape of y, added in front of the activation (the order of a residual
block). Activations: none, relu, gelu (the exact one, with erf), silu.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def check(activation: str) -> None:
    """ValueError unless `activation` is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z), elementwise. `activation` is one of ACTIVATIONS."""
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    return z


def slope(z: Tensor, activation: str) -> Tensor:
    """act'(z), elementwise; for relu `z` may also be the output."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return torch.ones_like(z)


def along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    """`vector` [c_out] shaped to broadcast along dimension `dim` of a tensor with `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return vector.reshape(shape)


def finish(product: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, dim: int = -1) -> Tensor:
    """The epilogue in plain torch. `dim` is the dimension of `product` that holds the output rows."""
    if scale is not None:
        product = product * along(scale, product.ndim, dim)
    if bias is not None:
        product = product + along(bias, product.ndim, dim)
    if residual is not None:
        product = product + residual
    return activate(product, activation)
