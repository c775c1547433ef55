"""`SparseLinear` and `SparseConv2d`: modules that hold a packed weight and call its operator.

The packed values are the trainable parameter, everything else is a buffer, and `layout` (int64) says how to read them, so that a
state_dict holds tensors only and loads into a module built for any other sparsity of the same layer shape:

    layout = [number of the format, rows, columns, kept, number of options, options ..., number of index tensors]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import epilogue, formats, validity
from .formats import FORMATS, Packed


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _vector(value: Tensor | None, like: Tensor) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().to(like.device, like.dtype).clone())


class _Packed(nn.Module):
    """A packed weight [rows, columns] with bias, per-row scale and activation."""

    def __init__(self, packed: Packed, bias: Tensor | None, scale: Tensor | None, activation: str) -> None:
        super().__init__()
        epilogue.check(activation)
        self.activation = activation
        self.values = nn.Parameter(packed.values.detach().clone(), requires_grad=packed.values.is_floating_point())
        self.bias = _vector(bias, packed.values)
        self.scale = _vector(scale, packed.values)
        self._adopt(packed.format, packed.rows, packed.columns, packed.kept, packed.options, packed.index)

    def _adopt(self, format: str, rows: int, columns: int, kept: int, options: Sequence[int], index: Sequence[Tensor]) -> None:
        formats.module_of(format)
        self.format, self.rows, self.columns, self.kept, self.options = format, rows, columns, kept, list(options)
        for name in getattr(self, "_index_names", []):
            delattr(self, name)
        self._index_names = [f"index{number}" for number in range(len(index))]
        for name, tensor in zip(self._index_names, index):
            self.register_buffer(name, tensor.to(self.values.device))
        layout = [FORMATS.index(format), rows, columns, kept, len(options), *options, len(index)]
        self.register_buffer("layout", torch.tensor(layout, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        packed = _stored(state_dict, prefix)
        if packed is not None:
            if (packed.rows, packed.columns) != (self.rows, self.columns):
                error_msgs.append(f"{prefix}layout holds a weight of {packed.rows} x {packed.columns}, but this layer has {self.rows} x {self.columns}")
                return
            if wrong := validity.fault(packed):
                error_msgs.append(f"{prefix[:-1] or 'the layer'} holds no packed weight of the format {packed.format}: {wrong}")
                return
            old = self.values
            self.values = nn.Parameter(torch.empty(packed.values.shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad)
            self._adopt(packed.format, packed.rows, packed.columns, packed.kept, packed.options, [t.clone() for t in packed.index])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

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


def _stored(state_dict: dict[str, Tensor], prefix: str) -> Packed | None:
    """The packed weight under `prefix`; None where a tensor is missing (torch names it), a format of "?" where the layout makes no sense."""
    layout, values = state_dict.get(f"{prefix}layout"), state_dict.get(f"{prefix}values")
    if layout is None or values is None:
        return None
    numbers = layout.tolist()
    count = numbers[4] if len(numbers) > 5 else -1
    if len(numbers) != count + 6 or not 0 <= numbers[0] < len(FORMATS) or not 0 <= numbers[-1] < 16:
        return Packed("?", values, [], *(numbers[1:3] if len(numbers) > 2 else (0, 0)), 0, (), 0)
    index = [state_dict.get(f"{prefix}index{i}") for i in range(numbers[-1])]
    if any(tensor is None for tensor in index):
        return None
    return Packed(FORMATS[numbers[0]], values, index, *numbers[1:4], tuple(numbers[5:5 + count]), 0)


class SparseLinear(_Packed):
    """y = act(scale * (x W^T) + bias + residual) for a packed W [out_features, in_features]; x [..., in_features]."""

    @classmethod
    def from_dense(cls, linear: nn.Linear, format: str | None = None, mask: Tensor | None = None, scale: Tensor | None = None,
                   activation: str = "none", **options) -> SparseLinear:
        """Packs the non-zero weights (or those that `mask`, bool of the weight's shape, keeps) of `linear`.

        `format` is one of formats.FORMATS with its options; without it run16 is taken on a GPU and csr elsewhere. The result is
        on the weight's device and in its dtype (bfloat16, float16 or float32; otherwise TypeError).
        """
        packed = pack_checked(format, linear.weight, mask, options)
        module = cls(packed, linear.bias, scale, activation)
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
        op = getattr(torch.ops.compress_kernels, f"{self.format}_linear")
        return op(x, self.values, self.index, self.scale, self.bias, residual, self.rows, self.columns, self.kept, self.options,
                  self.activation)

    def extra_repr(self) -> str:
        return f"in_features={self.columns}, out_features={self.rows}, {self._facts()}"


class SparseConv2d(_Packed):
    """The convolution of images [N, in_channels, H, W] with a packed weight [out_channels, in_channels, r, s]; zero padding, one group."""

    def __init__(self, packed: Packed, kernel_size, stride, padding, dilation, bias: Tensor | None, scale: Tensor | None = None,
                 activation: str = "none") -> None:
        super().__init__(packed, bias, scale, activation)
        self.kernel_size, self.stride, self.padding, self.dilation = (_pair(v) for v in (kernel_size, stride, padding, dilation))
        self.out_channels, self.in_channels, self.groups = self.rows, self.columns // math.prod(self.kernel_size), 1

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, format: str | None = None, mask: Tensor | None = None, scale: Tensor | None = None,
                   activation: str = "none", **options) -> SparseConv2d:
        """Packs the non-zero weights (or those that `mask` keeps) of `conv`; ValueError for groups, non-zero padding modes or "same"
        padding that is not symmetric. `format` is "csr" (default on the CPU) or "sparse_conv" (default elsewhere)."""
        reason = unsupported(conv)
        if reason:
            raise ValueError(f"a convolution with {reason} cannot be packed: keep it dense")
        format = format or ("sparse_conv" if conv.weight.is_cuda else "csr")
        if format not in formats.CONVOLUTIONS:
            raise ValueError(f"the sparse format {format!r} has no convolution; {', '.join(formats.CONVOLUTIONS)} have one")
        if format == "sparse_conv":
            options = {"kernel": tuple(conv.kernel_size), **options}
        mask = None if mask is None else mask.flatten(1)
        packed = pack_checked(format, conv.weight.flatten(1), mask, options)
        module = cls(packed, conv.kernel_size, conv.stride, _padding(conv), conv.dilation, conv.bias, scale, activation)
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
        op = getattr(torch.ops.compress_kernels, f"{self.format}_conv2d")
        return op(x, self.values, self.index, self.scale, self.bias, residual, self.rows, self.columns, self.kept, self.options,
                  self.activation, self.kernel_size, self.stride, self.padding, self.dilation)

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


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
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
        if module.bias is not None:
            dense.bias.copy_(module.bias)
    return dense.train(module.training)
