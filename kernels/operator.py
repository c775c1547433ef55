"""Turns a packed format into a torch operator with a fake kernel, a FLOP formula and gradients.

A packed matrix is a float tensor `values` (trainable, in the layout the kernel streams) and a list `index` of integer tensors. All that
is needed besides the kernel is `positions(index, ...)`: for every element of `values` its place `row * columns + column` in the dense
weight, or `rows * columns` for an element that stores nothing (padding). Everything else follows:

    decode:    dense[positions] = values
    gradient:  dW = (dL/dz)^T x, d values = dW[positions], 0 at padding

so that the backward pass may be dense while the forward pass is not.

Under autocast an operator computes in the data type of its weight: the other floating-point arguments are converted to it, and so the
output has it. (Converting the weight would change its layout, which is made for one size of number.)
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import epilogue

NAMESPACE = "compress_kernels"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Positions = Callable[[Tensor, Sequence[Tensor], int, int, Sequence[int]], Tensor]
Launch = Callable[..., Tensor]
Direct = Callable[..., Tensor | None]
AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# Registrations live as long as this object does.
_registry = torch.library.Library(NAMESPACE, "FRAGMENT")

LINEAR_SCHEMA = (
    "(Tensor x, Tensor values, Tensor[] index, Tensor? scale, Tensor? bias, Tensor? residual, int rows, int columns, int kept, "
    "int[] options, str activation) -> Tensor"
)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (the environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreter_fault() -> str | None:
    """Why the interpreter of the installed Triton cannot run kernels, or None. Triton before 3.7 makes integers of one-element arrays, which NumPy 2.4 ended."""
    import numpy
    import triton

    def release(module) -> tuple[int, ...]:
        return tuple(map(int, module.__version__.split(".")[:2]))

    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        return (f"The interpreter of Triton {triton.__version__} cannot run under NumPy {numpy.__version__}: install triton>=3.7 or numpy<2.4, "
                "or unset TRITON_INTERPRET.")
    return None


def runs_triton(x: Tensor) -> bool:
    """Whether a Triton kernel can run on `x`: Triton is there, and x on an NVIDIA GPU, or on the CPU under the interpreter.

    RuntimeError: TRITON_INTERPRET is set and the interpreter does not work with the installed NumPy.
    """
    if x.is_cuda:
        return torch.version.hip is None and has_triton()
    if x.device.type != "cpu" or not interpreted() or not has_triton():
        return False
    if interpreter_fault():
        raise RuntimeError(interpreter_fault())
    return True


def plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors (or None) in contiguous memory: kernels get addresses, not strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def aligned(tensor: Tensor, multiple: int = 8) -> Tensor:
    """A contiguous tensor whose first byte lies at a multiple of `multiple`: the tensor, or a copy. A slice of a larger one, as in a flat vector of
    all parameters, starts anywhere, and a GPU cannot read words of 8 bytes there."""
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % multiple or tensor.data_ptr() % multiple else tensor


def wide(dtype: torch.dtype, scale: Tensor | None) -> torch.dtype:
    """The data type for a product of such numbers in torch: float16 overflows before a small `scale` could bring it back, and the fused
    kernels sum in float32 as well."""
    return torch.float32 if scale is not None and dtype == torch.float16 else dtype


def register_autocast(name: str) -> None:
    """Makes the operator `name` compute in the data type of its values under autocast."""
    op = existing(name)

    def cast(device: str):
        def run(x, values, index, scale, bias, residual, *rest):
            like = [t if t is None or t.dtype not in DTYPES else t.to(values.dtype) for t in (x, scale, bias, residual)]
            with torch.autocast(device, enabled=False):
                return op(like[0], values, index, *like[1:], *rest)

        return run

    for device, key in AUTOCAST.items():
        _registry.impl(name, cast(device), key)


def decode(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix [rows, columns] in the dtype of `values`."""
    flat = values.new_zeros(rows * columns + 1)
    return flat.scatter(0, positions.reshape(-1), values.reshape(-1))[:-1].reshape(rows, columns)


def take(dense: Tensor, positions: Tensor) -> Tensor:
    """The entries of `dense` [rows, columns] at `positions`, 0 at padding."""
    flat = torch.cat([dense.reshape(-1), dense.new_zeros(1)])
    return flat[positions.reshape(-1)].reshape(positions.shape)


def check_tensors(x: Tensor, values: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None, rows: int) -> None:
    """One sentence for a wrong data type, device or vector length."""
    if values.dtype not in DTYPES:
        raise TypeError(f"the packed values are {values.dtype}, but only bfloat16, float16 and float32 are supported")
    for name, tensor in (("the input", x), *vectors.items(), ("the residual", residual)):
        if tensor is not None and tensor.dtype != values.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but the packed weight is {values.dtype}: convert one of them")
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, but the packed weight is on {values.device}: move one of them")
    for name, tensor in vectors.items():
        if tensor is not None and tuple(tensor.shape) != (rows,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but one number per output row is needed: [{rows}]")


def check_linear(x: Tensor, values: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None, rows: int, columns: int) -> None:
    """One sentence for whatever would make the kernel read or write outside its buffers."""
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"the input has shape {list(x.shape)}, but its last dimension must be {columns}, the columns of the packed weight")
    check_tensors(x, values, vectors, residual, rows)


def existing(name: str) -> Callable[..., Tensor] | None:
    """The operator of that name, if this package was already imported under another module name."""
    return getattr(getattr(torch.ops, NAMESPACE), name, None)


def define_linear(name: str, positions: Positions, launch: Launch | None, direct: Direct | None = None) -> Callable[..., Tensor]:
    """Registers `compress_kernels::<name>` (schema LINEAR_SCHEMA) and returns it.

    `launch(x [N, columns], values, index, scale, bias, residual [N, rows] | None, rows, columns, options, activation) -> y [N, rows]` is
    the Triton kernel. `direct`, same arguments, may compute it where no Triton kernel runs; without it (or where it returns None) the
    weight is decoded to dense. y has the shape of x with its last dimension replaced by `rows`.
    """
    found = existing(name)
    if found is not None:
        return found

    def forward(x: Tensor, values: Tensor, index, scale, bias, residual, rows: int, columns: int, kept: int, options,
                activation: str) -> Tensor:
        check_linear(x, values, {"the scale": scale, "the bias": bias}, residual, rows, columns)
        epilogue.check(activation)
        shape = (*x.shape[:-1], rows)
        if residual is not None and tuple(residual.shape) != shape:
            raise ValueError(f"the residual has shape {list(residual.shape)}, but the output has {list(shape)}")
        batch = math.prod(x.shape[:-1])
        flat = x.reshape(batch, columns)
        added = None if residual is None else residual.reshape(batch, rows)
        values, scale, bias, added, *index = plain(values, scale, bias, added, *index)
        if launch is not None and flat.shape[0] and rows and columns and runs_triton(x):
            return launch(flat, values, index, scale, bias, added, rows, columns, options, activation).reshape(shape)
        if direct is not None and flat.numel() and rows:
            y = direct(flat, values, index, scale, bias, added, rows, columns, options, activation)
            if y is not None:
                return y.reshape(shape)
        dtype, weight = wide(x.dtype, scale), decode(values, positions(values, index, rows, columns, options), rows, columns)
        product = flat.to(dtype) @ weight.to(dtype).t()
        return epilogue.finish(product, scale, bias, added, activation).to(x.dtype).reshape(shape)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=LINEAR_SCHEMA)

    @op.register_fake
    def _(x, values, index, scale, bias, residual, rows, columns, kept, options, activation):
        return x.new_empty((*x.shape[:-1], rows))

    def setup_context(ctx, inputs, output):
        x, values, index, scale, bias, residual, ctx.rows, ctx.columns, _, ctx.options, ctx.activation = inputs
        ctx.save_for_backward(x, values, scale, bias, residual, output if ctx.activation == "relu" else None, *index)

    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return gradients(ctx, grad)

    def gradients(ctx, grad):
        x, values, scale, bias, residual, output, *index = ctx.saved_tensors
        rows, columns = ctx.rows, ctx.columns
        places = positions(values, index, rows, columns, ctx.options)
        weight = decode(values, places, rows, columns)
        batch = math.prod(x.shape[:-1])
        flat, grad = x.reshape(batch, columns), grad.reshape(batch, rows)
        dtype = wide(x.dtype, scale)
        product = flat.to(dtype) @ weight.to(dtype).t() if ctx.activation in ("gelu", "silu") or ctx.needs_input_grad[3] else None
        if ctx.activation == "relu":
            grad = grad * epilogue.slope(output.reshape(batch, rows), "relu")
        elif ctx.activation != "none":
            added = None if residual is None else residual.reshape(batch, rows)
            grad = (grad * epilogue.slope(epilogue.finish(product, scale, bias, added, "none"), ctx.activation)).to(grad.dtype)
        needs = ctx.needs_input_grad
        d_residual = grad.reshape(residual.shape) if residual is not None and needs[5] else None
        d_bias = grad.sum(0) if bias is not None and needs[4] else None
        d_scale = (grad * product).sum(0).to(scale.dtype) if scale is not None and needs[3] else None
        if scale is not None:
            grad = grad * scale
        d_x = (grad @ weight).reshape(x.shape) if needs[0] else None
        d_values = take(grad.t() @ flat, places).reshape(values.shape) if needs[1] else None
        return d_x, d_values, [None] * len(index), d_scale, d_bias, d_residual, None, None, None, None, None

    op.register_autograd(backward, setup_context=setup_context)
    register_autocast(name)
    overload = existing(name)

    @register_flop_formula(overload)
    def _(x_shape, values_shape, index, scale, bias, residual, rows, columns, kept, *args, out_shape=None, **kwargs) -> int:
        return 2 * kept * math.prod(x_shape[:-1])

    return overload
