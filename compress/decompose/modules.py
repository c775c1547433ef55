"""Module surgery: one Linear or Conv2d replaced by its factors, and the exact cost of both.

A block is a plain sequence with named factors (`input`, `core`, `output`), so `state_dict`, safetensors, `torch.export` and hooks work as
for any network. Stride, padding (numbers, "same", "valid", every padding mode) and dilation belong to the core, or to the first factor
when the kernel is 1x1: a strided 1x1 then reads only the positions it needs. The bias sits on the last factor, where it is exact at
padded borders too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.decompose.factors import Factors, composed_shape, recompose
from compress.errors import UserError

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class FactorizedConv2d(nn.Sequential):
    """A convolution as a sequence of named factors; carries the geometry attributes of the layer that it replaced."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    depthwise: bool

    def factors(self) -> Factors:
        """The weights as `Factors` (views, not copies)."""
        named = {name: module.weight.detach() for name, module in self.named_children()}
        for name in ("input", "output"):
            if name in named and named[name].shape[2:].numel() == 1:
                named[name] = named[name].flatten(1)
        return Factors(named.get("input"), named.get("core"), named.get("output"), self.depthwise, self.groups)


class FactorizedLinear(nn.Sequential):
    """A linear layer as a sequence of named factors."""

    in_features: int
    out_features: int

    def factors(self) -> Factors:
        """The weights as `Factors` (views, not copies)."""
        named = {name: module.weight.detach() for name, module in self.named_children()}
        return Factors(named.get("input"), named.get("core"), named.get("output"))


Layer = nn.Conv2d | nn.Linear | FactorizedConv2d | FactorizedLinear


def layer_bias(module: nn.Module) -> nn.Parameter | None:
    """The bias of a layer or of a block's last factor."""
    return (list(module.children())[-1] if isinstance(module, nn.Sequential) else module).bias


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer, or the product of a block's factors, detached."""
    return recompose(module.factors()) if isinstance(module, nn.Sequential) else module.weight.detach()


def factorizable(module: nn.Module) -> bool:
    """Whether `factorize` handles the module: exactly Conv2d or Linear (a subclass may compute something else), or one of our blocks."""
    return type(module) in (nn.Conv2d, nn.Linear, FactorizedConv2d, FactorizedLinear)


def build_block(module: nn.Module, factors: Factors) -> FactorizedConv2d | FactorizedLinear:
    """The block with these factors in the place of `module` (a layer or an earlier block): same geometry, bias, device, type and flags.

    Raises
    ------
    UserError: the module is no Linear, Conv2d or block, or the factors do not compose, or not to its weight's shape.
    """
    if not factorizable(module):
        raise UserError(f"A module of type {type(module).__name__} cannot be factorized; expected exactly Linear or Conv2d.")
    convolution = hasattr(module, "kernel_size")
    shape = _weight_shape(module)
    composed = composed_shape(factors)
    if composed != shape or (convolution and factors.groups != module.groups):
        raise UserError(
            f"The factors compose to a weight {composed} in {factors.groups} groups, but the layer has {shape}; give factors of this layer."
        )
    reference = next(module.parameters())
    names = list(factors.tensors)
    children: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name, weight in factors.tensors.items():
            bias = name == names[-1] and layer_bias(module) is not None
            if convolution:
                children[name] = _conv(module, name, names, weight, bias, factors)
            else:
                children[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    block = FactorizedConv2d() if convolution else FactorizedLinear()
    for name, child in children.items():
        # materialised one by one: initialising weights that are overwritten would only move the caller's random state
        child.weight = nn.Parameter(
            factors.tensors[name].detach().to(reference).reshape(child.weight.shape).clone(memory_format=_memory(reference, child.weight)), _trained(module, name)
        )
        if child.bias is not None:
            bias = layer_bias(module)
            child.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        block.add_module(name, child)
    for attribute in GEOMETRY if convolution else ("in_features", "out_features"):
        setattr(block, attribute, getattr(module, attribute))
    if convolution:
        block.depthwise = factors.depthwise
    return block.train(module.training)


def _memory(reference: Tensor, weight: Tensor) -> torch.memory_format:
    """Channels last where the layer's weight is."""
    last = reference.ndim == 4 and not reference.is_contiguous() and reference.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and weight.ndim == 4 else torch.contiguous_format


def _trained(module: nn.Module, name: str) -> bool:
    """Whether a new factor is trained: as the block's own factor of this name, else as its core; as the weight of a layer."""
    factors = dict(module.named_children())
    return next(factors.get(name, factors.get("core", module)).parameters()).requires_grad


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if hasattr(module, "kernel_size"):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return (module.out_features, module.in_features)


def _conv(module: nn.Module, name: str, names: list[str], weight: Tensor, bias: bool, factors: Factors) -> nn.Conv2d:
    """One factor as a convolution; the geometry goes, per spatial axis, to the factor that carries this axis of the kernel."""
    kernel = tuple(weight.shape[2:]) or (1, 1)
    groups = weight.shape[0] if factors.depthwise and name == "core" else factors.groups
    owners = [names[0] if module.kernel_size[axis] == 1 else _owner(axis, factors) for axis in (0, 1)]
    mine = [owner == name for owner in owners]
    padding = module.padding
    if not isinstance(padding, str):
        padding = tuple(value if own else 0 for value, own in zip(padding, mine, strict=True))
    elif not any(mine):
        padding = 0
    stride, dilation = (
        tuple(value if own else 1 for value, own in zip(values, mine, strict=True)) for values in (module.stride, module.dilation)
    )
    return nn.Conv2d(weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, dilation, groups, bias,
                     module.padding_mode if any(mine) else "zeros")


def _owner(axis: int, factors: Factors) -> str:
    """The factor whose kernel spans a spatial axis."""
    return next(name for name, tensor in factors.tensors.items() if tensor.ndim == 4 and tensor.shape[2 + axis] > 1)


def output_size(module: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after a convolution or block for an input of `size`."""
    if module.padding == "same":
        return size
    padding = (0, 0) if module.padding == "valid" else module.padding
    rows = zip(size, module.kernel_size, module.stride, padding, module.dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows)


@dataclass(frozen=True)
class Calls:
    """What a layer is called with in one forward pass of `images` images: the shape of every call's input, all leading dimensions included.

    Their number and the leading dimensions are the network's own: a layer may be called several times, or on windows folded into the batch.
    """

    shapes: tuple[tuple[int, ...], ...]
    images: int = 1


def as_calls(inputs: tuple[int, ...] | Calls) -> Calls:
    """`inputs` itself, or one call for one image of that shape."""
    return inputs if isinstance(inputs, Calls) else Calls((tuple(inputs),))


def layer_cost(module: nn.Module, inputs: tuple[int, ...] | Calls) -> tuple[int, int]:
    """(parameters with bias, MACs per image over all calls) of a layer or block.

    inputs: the calls, or one image's input shape of the only one: [c, h, w], or [..., features].
    """
    calls = as_calls(inputs)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    stages = list(module.children()) if isinstance(module, nn.Sequential) else [module]
    macs = 0
    for shape in calls.shapes:
        size = shape[-2:]
        for stage in stages:
            if isinstance(stage, nn.Conv2d):
                size = output_size(stage, size)
                macs += stage.weight.numel() * math.prod((*shape[:-3], *size))
            else:
                macs += stage.weight.numel() * math.prod(shape[:-1])
    return parameters, macs // calls.images


def factors_cost(module: nn.Module, factors: Factors, inputs: tuple[int, ...] | Calls) -> tuple[int, int]:
    """`layer_cost` of the block that `build_block` would give, without copying weights."""
    return layer_cost(build_block(_meta_like(module), factors.map(lambda tensor: tensor.to("meta"))), inputs)


def _meta_like(module: nn.Module) -> nn.Module:
    """The same layer with weights on the meta device."""
    bias = layer_bias(module) is not None
    with torch.device("meta"):
        if hasattr(module, "kernel_size"):
            values: dict[str, Any] = {name: getattr(module, name) for name in GEOMETRY}
            return nn.Conv2d(**values, bias=bias)
        return nn.Linear(module.in_features, module.out_features, bias)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` at the dotted name, and at every other name under which the same module is reachable: shared layers stay shared.

    A transformer layer around a block is made to call its layers (see `_call_layers`).

    Raises
    ------
    UserError: the name is that of the network itself.
    """
    old = model.get_submodule(name)
    if old is model:
        raise UserError(f"The network is a single {type(old).__name__}, which can only be replaced inside a module; wrap it in nn.Sequential.")
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
                if isinstance(parent, nn.TransformerEncoderLayer):
                    _call_layers(model, parent)


def _call_layers(model: nn.Module, layer: nn.TransformerEncoderLayer) -> None:
    """Makes a layer, and the encoders that hold it, call their linear layers in evaluation mode too.

    Without gradients both use fused operators that read `linear1.weight` and `linear2.weight`, which a block has not. These attributes
    are what torch itself sets where the fused operators do not apply; nothing else reads them.
    """
    layer.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(part is layer for part in module.layers):
            module.use_nested_tensor = False


def describe(block: FactorizedConv2d | FactorizedLinear) -> dict[str, Any]:
    """Shapes of a block's factors as JSON data, from which `rebuild` makes the same architecture."""
    factors = block.factors()
    return {"shapes": {name: list(tensor.shape) for name, tensor in factors.tensors.items()}, "depthwise": factors.depthwise}


def rebuild(module: nn.Module, description: dict[str, Any]) -> FactorizedConv2d | FactorizedLinear:
    """The block that `describe` described, in the place of `module`, with zero factors and the bias of `module`.

    Raises
    ------
    UserError: the description does not fit the layer.
    """
    reference = next(module.parameters())
    named = {name: reference.new_zeros(shape) for name, shape in description["shapes"].items()}
    factors = Factors(named.get("input"), named.get("core"), named.get("output"), description["depthwise"], getattr(module, "groups", 1))
    return build_block(module, factors)
