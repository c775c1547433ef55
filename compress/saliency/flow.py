"""The network as a positive linear map: the substitutions under which synaptic flow and path counts are defined.

While `PositiveFlow` is active, convolutions and linear layers run without bias, and BatchNorm is the plain scale
|gamma| / sqrt(var + eps) per channel (norms that use the data's own statistics: |gamma|). Biases and shifts that are
themselves scored (`biases`) stay in, as positive numbers: each is a weight from a unit that is always 1. With non-negative weights
and inputs all activations are then non-negative, ReLU is the identity, and the output is homogeneous of degree 1 in every layer. Source:
Tanaka et al. 2020, arXiv:2006.05467, section 4; folding the normalisation keeps the homogeneity for trained networks too, where taking
absolute values of the running mean would break it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
_LINEAR = {F.linear, torch._C._nn.linear}
WEIGHTED = CONVOLUTIONS | _LINEAR
# Norms that take their statistics from the data, with the position of gamma among their arguments.
_DATA_NORMS = {F.layer_norm: 2, F.group_norm: 2, F.instance_norm: 3}


def without_bias(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a convolution or linear call, with the bias (third argument) left out."""
    return (*args[:2], None, *args[3:]) if len(args) > 2 else args, {**kwargs, "bias": None} if "bias" in kwargs else kwargs


def _data_norm(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """x * |gamma|: normalisation by the data's own statistics has no positive linear counterpart but its scale."""
    x, place = args[0], _DATA_NORMS[func]
    weight = args[place] if len(args) > place else kwargs.get("weight")
    if weight is None:
        return x
    # layer_norm scales the last dimensions, the others the channels.
    return x * (weight.abs() if func is F.layer_norm else weight.abs().view(1, -1, *[1] * (x.dim() - 2)))


class PositiveFlow(TorchFunctionMode):
    """Runs a network without biases and with BatchNorm as a positive scale; `unit_variance` makes that scale |gamma|.

    `biases`: tensors (by identity) that are added where they are a bias or the shift of a normalisation; they must not be negative.
    The original function is called for everything else.
    """

    def __init__(self, unit_variance: bool = False, biases: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.unit_variance = unit_variance
        self.biases = {id(bias): bias for bias in biases}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHTED:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            args, kwargs = without_bias(args, kwargs)
            if self.scored(bias):
                args, kwargs = (*args[:2], self.bias(bias), *args[3:]), {key: value for key, value in kwargs.items() if key != "bias"}
            return self.weighted(func, args, kwargs)
        if func is F.batch_norm:
            return self.scale(*args, **kwargs)
        if func in _DATA_NORMS:
            return _data_norm(func, args, kwargs)
        return func(*args, **kwargs)

    def scored(self, bias: Tensor | None) -> bool:
        """Whether this bias takes part."""
        return bias is not None and id(bias) in self.biases

    def bias(self, bias: Tensor) -> Tensor:
        """What is added for a bias that takes part."""
        return bias

    def weighted(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """A convolution or linear layer, already without a bias that takes no part."""
        return func(*args, **kwargs)

    def scale(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """x * |gamma| / sqrt(var + eps), and the shift where it takes part, with the arguments of `torch.nn.functional.batch_norm`."""
        factor = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weight is None else weight.abs()
        if running_var is not None and not self.unit_variance:
            factor = factor / (running_var + eps).sqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * factor.view(shape) + self.bias(bias).view(shape) if self.scored(bias) else x * factor.view(shape)


def constant_inputs(shape: tuple[int, ...], like: Tensor, value: float = 1.0) -> Tensor:
    """One input of the shape `[1, *shape]` filled with `value`, in float64 on the device of `like`."""
    return torch.full((1, *shape), value, dtype=torch.float64, device=like.device)


def total(output: Any) -> Tensor:
    """The sum over all tensors of a network's output."""
    if isinstance(output, Tensor):
        return output.sum()
    parts = output.values() if isinstance(output, dict) else output
    return sum((total(part) for part in parts if part is not None), start=torch.zeros(()))


def double_state(model: nn.Module) -> dict[str, Tensor]:
    """Detached float64 copies of all parameters and floating buffers, for `torch.func.functional_call`; ties are kept by name."""
    copies: dict[int, Tensor] = {}
    state = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.is_floating_point():
            state[name] = copies.setdefault(id(tensor), tensor.detach().to(torch.float64, copy=True))
    return state
