"""What a masked network really consists of: effective density, empty layers, dead channels, MACs.

A kept weight is effective iff it lies on a path of kept weights from the input to the output (Vysogorets and Kempe 2021,
arXiv:2107.02306). Forward, a position is reached iff it has a kept weight from a reached position; backward likewise from the output;
a weight is effective iff for some position its source is reached from the input and its target reaches the output. Both passes run the
network on ones with the masks as weights and every layer's result cut to {0, 1}, so that nothing over- or underflows: this is exact.
Biases are no paths: one counts as effective iff it is kept and its unit lies on a path. Max-pooling lets every position of its window through.

Symbols: mask `[c_out, c_in, k...]`, density d_l = kept / weights of layer l; MACs of the masked network = sum_l d_l * MACs_l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.masks.buffers import Masks, mask_names
from compress.saliency.flow import CONVOLUTIONS, WEIGHTED, PositiveFlow, total, without_bias
from compress.saliency.statistics import scoring_mode

_MAX_POOLS = {
    F.max_pool1d: F.avg_pool1d, F.max_pool2d: F.avg_pool2d, F.max_pool3d: F.avg_pool3d,
    torch.max_pool1d: F.avg_pool1d, torch.max_pool2d: F.avg_pool2d, torch.max_pool3d: F.avg_pool3d,
}  # fmt: skip
_ADAPTIVE_MAX_POOLS = {
    F.adaptive_max_pool1d: F.adaptive_avg_pool1d,
    F.adaptive_max_pool2d: F.adaptive_avg_pool2d,
    F.adaptive_max_pool3d: F.adaptive_avg_pool3d,
}


class _Cut(torch.autograd.Function):
    """1 where the value is positive, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad > 0).to(grad.dtype)


class _Mark(torch.autograd.Function):
    """x [n, c, ...] as it is; the gradient of the second argument [c] is positive where some position of its unit lies on a path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        on_path = ((ctx.saved_tensors[0] > 0) & (grad > 0)).movedim(ctx.dim, 0).flatten(1).any(1)
        return grad, on_path.to(grad.dtype), None


class _PathFlow(PositiveFlow):
    """Positive flow whose layers give 0 or 1, with average instead of max pooling and only the scales of normalisation.

    Biases add nothing; those given are told whether their units lie on a path.
    """

    def __init__(self, biases: Sequence[Tensor] = ()) -> None:
        super().__init__(unit_variance=True, biases=biases)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _MAX_POOLS:
            return _average(func, args, kwargs or {})
        if func in _ADAPTIVE_MAX_POOLS:
            return _ADAPTIVE_MAX_POOLS[func](*args[:2])
        return super().__torch_function__(func, types, args, kwargs)

    def weighted(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        bias = args[2] if len(args) > 2 else None
        plain, kwargs = without_bias(args, kwargs)
        output = _Cut.apply(func(*plain, **kwargs))
        return output if bias is None else _Mark.apply(output, bias, 1 if func in CONVOLUTIONS else -1)

    def scale(self, x: Tensor, mean: Any, var: Any, weight: Tensor | None = None, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        output = super().scale(x, mean, var, weight, None, *args, **kwargs)
        return _Mark.apply(output, bias, 1) if self.scored(bias) else output


def _average(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Average pooling with the window of a max pooling; dilated windows stay as they are, which lets their first position through."""
    names = ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
    if given.get("dilation", 1) not in (1, (1, 1), [1, 1]):
        return func(*args, **kwargs)
    window = given["kernel_size"]
    return _MAX_POOLS[func](args[0], window, given.get("stride") or window, given.get("padding", 0), given.get("ceil_mode", False))


def effective_masks(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """The part of each mask that lies on a path from input to output; parameters without a mask count as kept.

    `input_shape` is one input without the batch dimension. Nothing of `model` changes.
    """
    state: dict[str, Tensor] = {name: torch.ones_like(p, dtype=torch.float32) for name, p in model.named_parameters(remove_duplicate=False)}
    chosen = {name: mask.float().requires_grad_(True) for name, mask in masks.items()}
    ones = torch.ones(1, *input_shape, device=next(iter(state.values())).device)
    biases = [mask for name, mask in chosen.items() if name.rpartition(".")[2] == "bias"]
    with scoring_mode(model), torch.enable_grad(), _PathFlow(biases):
        output = total(functional_call(model, state | chosen, (ones,)))
    if not output.requires_grad:
        return {name: torch.zeros_like(mask) for name, mask in masks.items()}
    grads = torch.autograd.grad(output, list(chosen.values()), allow_unused=True)
    return {
        name: torch.zeros_like(masks[name]) if grad is None else masks[name] & (grad > 0) for name, grad in zip(chosen, grads, strict=True)
    }


class _CountMacs(torch.overrides.TorchFunctionMode):
    """Adds the multiply-accumulates of every convolution and linear call to the name of its weight."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.macs: dict[str, int] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in WEIGHTED:
            x, weight = args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"]
            name = self.names.get(id(weight))
            if name is not None:
                moved = x if "transpose" in func.__name__ else output
                self.macs[name] = self.macs.get(name, 0) + moved.numel() * weight[0].numel()
        return output


def layer_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates for one input, by weight name: convolutions and linear layers, without biases."""
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    counter = _CountMacs({id(parameter): name for name, parameter in model.named_parameters()})
    with scoring_mode(model), torch.no_grad(), counter:
        model(torch.zeros(1, *input_shape, device=device, dtype=dtype))
    return counter.macs


@dataclass(frozen=True)
class MaskedLayer:
    """One masked parameter: counts of weights, MACs for one input, and output channels without an effective weight (of matrices and filters;
    0 for vectors, whose channels are those of the layer before)."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    effective: int
    density: float
    macs: int
    macs_nonzero: float
    channels: int
    dead_channels: int


@dataclass(frozen=True)
class MaskReport:
    """Counts over all masked parameters; `macs` and `macs_nonzero` are of the whole network, layers without masks included."""

    layers: list[MaskedLayer]
    weights: int
    kept: int
    effective: int
    macs: int
    macs_nonzero: float

    @property
    def density(self) -> float:
        """Kept over all."""
        return self.kept / self.weights

    @property
    def effective_density(self) -> float:
        """Effective over all."""
        return self.effective / self.weights

    @property
    def empty_layers(self) -> list[str]:
        """Parameters without a kept weight."""
        return [layer.name for layer in self.layers if layer.kept == 0]

    @property
    def dead_channels(self) -> int:
        """Output channels without an effective weight, over all layers."""
        return sum(layer.dead_channels for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; compression ratios are null where nothing is left."""
        return {
            "weights": self.weights,
            "kept": self.kept,
            "effective": self.effective,
            "density": self.density,
            "effective_density": self.effective_density,
            "compression_ratio": self.weights / self.kept if self.kept else None,
            "effective_compression_ratio": self.weights / self.effective if self.effective else None,
            "layer_mean_sparsity": 1 - sum(layer.density for layer in self.layers) / len(self.layers),
            "empty_layers": self.empty_layers,
            "dead_channels": self.dead_channels,
            "macs": self.macs,
            "macs_nonzero": self.macs_nonzero,
            "layers": [asdict(layer) for layer in self.layers],
        }


def report(masks: Masks, input_shape: Sequence[int]) -> MaskReport:
    """Count what the network under `masks` consists of."""
    kept = dict(masks.items())
    effective = effective_masks(masks.model, kept, input_shape)
    macs = layer_macs(masks.model, input_shape)
    layers = []
    for name, mask in kept.items():
        alive = int(mask.sum())
        dead = int((~effective[name].flatten(1).any(1)).sum()) if mask.dim() > 1 else 0
        cost = macs.get(name, 0)
        layers.append(
            MaskedLayer(
                name=name,
                shape=tuple(mask.shape),
                weights=mask.numel(),
                kept=alive,
                effective=int(effective[name].sum()),
                density=alive / mask.numel(),
                macs=cost,
                macs_nonzero=cost * alive / mask.numel(),
                channels=mask.shape[0],
                dead_channels=dead,
            )
        )
    whole = sum(macs.values())
    nonzero = whole - sum(layer.macs - layer.macs_nonzero for layer in layers)
    sums = [sum(getattr(layer, field) for layer in layers) for field in ("weights", "kept", "effective")]
    return MaskReport(layers, *sums, whole, nonzero)


def mask_report(model: nn.Module, example: Any) -> MaskReport | None:
    """The counts of a masked network; None for one without masks, and where `example` is not one tensor `[n, ...]`."""
    return report(Masks.of(model), example.shape[1:]) if mask_names(model) and isinstance(example, Tensor) else None


def mask_columns(model: nn.Module, example: Any, found: MaskReport | None = None) -> dict[str, Any]:
    """What masks add to a row of results: density, macs_nonzero (one input), effective_density, empty_layers, dead_channels.

    Empty for a network without masks; the density alone where `example` is not one tensor `[n, ...]`. `found`: its counts, where they are
    known already.
    """
    if not mask_names(model):
        return {}
    found = found or mask_report(model, example)
    if found is None:
        return {"density": Masks.of(model).density}
    return {
        "density": found.density,
        "macs_nonzero": round(found.macs_nonzero),
        "effective_density": found.effective_density,
        "empty_layers": len(found.empty_layers),
        "dead_channels": found.dead_channels,
    }
