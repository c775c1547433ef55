"""`SparseLinear` and `SparseConv2d`: modules that hold a packed weight and call its operator.

The packed values are the trainable parameter, everything else is a buffer, and `layout` (int64, see state.py) says how to read them, so
that a state_dict holds tensors only and loads into a module built for any other sparsity or data type of the same layer shape.

Conversions (`.half()`, `.to(dtype)`) keep the weights that are stored; an optimizer made before one that changes the size of a number
holds moments in the old order. Under autocast a module computes in the data type of its weight and returns it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import convolution, epilogue, formats, state
from .formats import FORMATS, Packed

# A module that comes out of a file (torch.load, torch.export.load) finds its operators registered.
for _format in FORMATS:
    formats.module_of(_format)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _trains(value: Tensor) -> bool:
    """Whether what is made from `value` is trained: a parameter may be frozen, a computed tensor is not."""
    return value.requires_grad or not isinstance(value, nn.Parameter)


def _vector(value: Tensor | None, like: Tensor) -> nn.Parameter | None:
    if value is None:
        return None
    return nn.Parameter(value.detach().to(like.device, like.dtype).clone(memory_format=torch.contiguous_format), _trains(value))


class _Packed(nn.Module):
    """A packed weight [rows, columns] with bias, per-row scale and activation."""

    _kernel: tuple[int, ...] = ()

    def __init__(self, packed: Packed, bias: Tensor | None, scale: Tensor | None, activation: str, kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        epilogue.check(activation)
        self.activation, self._kernel = activation, kernel
        values = packed.values.detach().clone(memory_format=torch.contiguous_format)
        self.values = nn.Parameter(values, requires_grad=values.is_floating_point())
        self.bias = _vector(bias, packed.values)
        self.scale = _vector(scale, packed.values)
        self._adopt(packed)

    def _adopt(self, packed: Packed) -> None:
        """Takes over everything but the values."""
        formats.module_of(packed.format)
        self.format, self.rows, self.columns, self.kept, self.options = (
            packed.format, packed.rows, packed.columns, packed.kept, list(packed.options))
        for name in getattr(self, "_index_names", []):
            delattr(self, name)
        self._index_names = [f"index{number}" for number in range(len(packed.index))]
        for name, tensor in zip(self._index_names, packed.index):
            self.register_buffer(name, tensor.to(self.values.device).contiguous())
        self.register_buffer("layout", state.layout(packed, self._kernel, self.values.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        try:
            stored = state.read(state_dict, prefix)
            wrong = stored and state.refusal(*stored, prefix, self.rows, self.columns, self._kernel)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            error_msgs.append(wrong)
            return
        if stored is not None:
            state_dict = self._fitted(stored[0], state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _fitted(self, packed: Packed, state_dict: dict[str, Tensor], prefix: str, assign: bool) -> dict[str, Tensor]:
        """Makes room for `packed` in this module and returns the state with its tensors as they will lie here; parameters of the right
        shape stay the same objects, so that an optimizer keeps training them."""
        own = self.values
        values = state.relayout(packed, packed.values.dtype, packed.values.dtype if assign else own.dtype)
        if values.shape != own.shape:
            self.values = nn.Parameter(torch.empty(values.shape, dtype=own.dtype, device=own.device), requires_grad=own.requires_grad)
        self._adopt(replace(packed, index=[tensor.clone() for tensor in packed.index]))
        fitted = {f"index{number}": tensor for number, tensor in enumerate(packed.index)}
        fitted |= {"values": values, "layout": state.layout(packed, self._kernel, values.device)}
        return {**state_dict, **{f"{prefix}{name}": tensor for name, tensor in fitted.items()}}

    def _apply(self, fn, recurse: bool = True):
        before = self.values.dtype
        super()._apply(fn, recurse)
        for tensor in (self.values, self.values.grad):
            if tensor is not None and (tensor.dtype != before or not tensor.is_contiguous()):
                tensor.data = state.relayout(replace(self.packed, values=tensor.detach()), before, tensor.dtype)
        return self

    @property
    def index(self) -> list[Tensor]:
        """The integer tensors of the packed weight."""
        return [getattr(self, name) for name in self._index_names]

    @property
    def packed(self) -> Packed:
        """The packed weight as data (sharing memory with this module)."""
        return Packed(self.format, self.values.detach(), self.index, self.rows, self.columns, self.kept, tuple(self.options), 0)

    @property
    def density(self) -> float:
        """Fraction of kept weights."""
        return self.kept / max(1, self.rows * self.columns)

    def _facts(self) -> str:
        extra = "" if self.activation == "none" else f", activation={self.activation}"
        return f"bias={self.bias is not None}, density={self.density:.3f}, format={self.format}, options={tuple(self.options)}{extra}"


class SparseLinear(_Packed):
    """y = act(scale * (x W^T) + bias + residual) for a packed W [out_features, in_features]; x [..., in_features] or a nested tensor
    [n, *, in_features].

    In an nn.TransformerEncoderLayer use encoder.call_layers, as `sparsify` does: otherwise torch decodes the weight in every call there.
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, format: str | None = None, mask: Tensor | None = None, scale: Tensor | None = None,
                   activation: str = "none", **options) -> SparseLinear:
        """Packs the non-zero weights (or those that `mask`, bool of the weight's shape, keeps) of `linear`.

        `format` is one of formats.FORMATS with its options; without it run16 is taken on a GPU and csr elsewhere. The result is
        on the weight's device and in its dtype (bfloat16, float16 or float32; otherwise TypeError).
        """
        packed = pack_checked(format, linear.weight, mask, options)
        module = cls(packed, linear.bias, scale, activation)
        module.values.requires_grad_(_trains(linear.weight))
        return module.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias; scale and activation, which it cannot hold, must not be set."""
        _refuse_epilogue(self)
        dense = nn.utils.skip_init(nn.Linear, self.columns, self.rows, self.bias is not None, device=self.values.device,
                                   dtype=self.values.dtype)
        return _fill(dense, self)

    in_features = property(lambda self: self.columns)
    out_features = property(lambda self: self.rows)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at every access."""
        return formats.unpack(self.packed)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.is_nested:
            return self._nested(x, residual)
        op = getattr(torch.ops.compress_kernels, f"{self.format}_linear")
        return op(x, self.values, self.index, self.scale, self.bias, residual, self.rows, self.columns, self.kept, self.options,
                  self.activation)

    def _nested(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """All rows of all parts at once."""
        parts = x.unbind()
        y = self.forward(torch.cat(parts), None if residual is None else torch.cat(residual.unbind()))
        if x.layout == torch.jagged and x.lengths() is None:
            # The same offsets let torch add x and y.
            return torch.nested.nested_tensor_from_jagged(y, x.offsets())
        return torch.nested.as_nested_tensor(list(y.split([len(part) for part in parts])), layout=x.layout)

    def extra_repr(self) -> str:
        return f"in_features={self.columns}, out_features={self.rows}, {self._facts()}"


class SparseConv2d(_Packed):
    """The convolution of images [N, in_channels, H, W] (or one, without N) with a packed weight [out_channels, in_channels, r, s]; zero
    padding, one group."""

    def __init__(self, packed: Packed, kernel_size, stride, padding, dilation, bias: Tensor | None, scale: Tensor | None = None,
                 activation: str = "none") -> None:
        super().__init__(packed, bias, scale, activation, _pair(kernel_size))
        self.kernel_size, self.stride, self.padding, self.dilation = (_pair(v) for v in (kernel_size, stride, padding, dilation))
        self.out_channels, self.in_channels, self.groups = self.rows, self.columns // math.prod(self.kernel_size), 1

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, format: str | None = None, mask: Tensor | None = None, scale: Tensor | None = None,
                   activation: str = "none", **options) -> SparseConv2d:
        """Packs the non-zero weights (or those that `mask` keeps) of `conv`; ValueError for groups, non-zero padding modes or "same"
        padding that is not symmetric. `format` is "csr" (default on the CPU), "sparse_conv" (default elsewhere), or for 1 x 1 any other."""
        reason = unsupported(conv)
        if reason:
            raise ValueError(f"a convolution with {reason} cannot be packed: keep it dense")
        format = format or ("sparse_conv" if conv.weight.is_cuda else "csr")
        if not formats.convolves(format, conv.kernel_size):
            others = ", ".join(formats.CONVOLUTIONS)
            raise ValueError(f"the sparse format {format!r} has no convolution of more than 1 x 1; {others} have one")
        if format == "sparse_conv":
            options = {"kernel": tuple(conv.kernel_size), **options}
        mask = None if mask is None else mask.flatten(1)
        packed = pack_checked(format, conv.weight.flatten(1), mask, options)
        module = cls(packed, conv.kernel_size, conv.stride, padding(conv), conv.dilation, conv.bias, scale, activation)
        module.values.requires_grad_(_trains(conv.weight))
        return module.train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """An `nn.Conv2d` with the same weight and bias; scale and activation, which it cannot hold, must not be set."""
        _refuse_epilogue(self)
        dense = nn.utils.skip_init(nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                                   self.dilation, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        return _fill(dense, self)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels, r, s], decoded at every access."""
        return formats.unpack(self.packed).view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)).squeeze(0)
        given = (x, self.values, self.index, self.scale, self.bias, residual, self.rows, self.columns, self.kept, self.options,
                 self.activation, self.kernel_size, self.stride, self.padding, self.dilation)
        if self.format not in formats.CONVOLUTIONS:
            return convolution.pointwise(getattr(torch.ops.compress_kernels, f"{self.format}_linear"), *given)
        return getattr(torch.ops.compress_kernels, f"{self.format}_conv2d")(*given)

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, {self._facts()}")


def pack_checked(format: str | None, weight: Tensor, mask: Tensor | None, options: dict) -> Packed:
    """Packs a matrix after checking dtype and mask."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"the weight is {weight.dtype}, but only bfloat16, float16 and float32 can be packed")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        expected = f"a bool mask of the weight's shape {list(weight.shape)}"
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}, but {expected} is needed")
    return formats.pack(format or ("run16" if weight.is_cuda else "csr"), weight, mask, **options)


def padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Pixels of zeros above and beside the image."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return _pair(conv.padding)


def unsupported(conv: nn.Conv2d) -> str | None:
    """What about `conv` no packed convolution can do, or None."""
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size)):
        return "asymmetric 'same' padding"
    return None


def _refuse_epilogue(module: _Packed) -> None:
    if module.scale is not None or module.activation != "none":
        raise ValueError("a dense layer cannot hold this layer's scale or activation: apply them in modules of their own")


def _fill(dense: nn.Module, module: _Packed) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        dense.weight.requires_grad_(module.values.requires_grad)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
            dense.bias.requires_grad_(module.bias.requires_grad)
    return dense.train(module.training)
