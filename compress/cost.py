"""What a network costs: parameters, multiply-accumulates (MACs), bytes of layer outputs.

params            elements of all parameters, each counted once however many names it has; buffers are not parameters
macs              multiply-accumulates of convolutions, linear layers and matrix products (attention included) for one image, from
                  torch.utils.flop_counter on a real forward pass (2 FLOPs = 1 MAC); no BatchNorm, no bias, no activation function
activation_bytes  bytes of the outputs of all layers (modules without children) for one image, in the data type they have. An output
                  that shares memory with an input (in-place ReLU, Flatten, Identity) is not counted again.

The forward pass runs in evaluation mode with gradients enabled and the fused attention paths off, because their kernels are opaque to
the counter. Inputs with a batch of B count 1/B. Closed formulas, with T output positions:

    convolution   T * c_out * (c_in / groups) * k * k          linear   T * out * in          attention   2 * heads * T * T * d_head
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import UserError
from compress.undisturbed import arguments, differentiable, undisturbed


@dataclass(frozen=True)
class Cost:
    """Parameters; MACs and bytes of layer outputs per image."""

    params: int
    macs: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """2 x MACs."""
        return 2 * self.macs


@dataclass(frozen=True)
class LayerRow:
    """One module's own cost (what its children cost is theirs); `shape` is its output's, for the example batch."""

    name: str
    kind: str
    params: int
    macs: int
    activation_bytes: int
    shape: tuple[int, ...]


def count(model: nn.Module, example_inputs: Any) -> Cost:
    """Exact cost of `model`; `example_inputs` is a tensor [B, ...] or a tuple of positional arguments whose first is one.

    The model is left as it was (flags, buffers, hooks, gradients). UserError where it does not accept the inputs' batch.
    """
    rows = layer_costs(model, example_inputs)
    return Cost(count_parameters(model), sum(row.macs for row in rows), sum(row.activation_bytes for row in rows))


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_costs(model: nn.Module, example_inputs: Any) -> list[LayerRow]:
    """A row for each module that has a cost of its own, in the order of `named_modules`; the rows add up to `count`.

    A module with several names or several calls has one row, with the sum over its calls. Functional matrix products
    belong to the module whose `forward` calls them.
    """
    inputs = arguments(example_inputs)
    batch = batch_size(inputs)
    flops, outputs, shapes = _run(model, inputs)
    counted: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        params = 0
        for parameter in module.parameters(recurse=False):
            params += parameter.numel() if id(parameter) not in counted else 0
            counted.add(id(parameter))
        macs, size = flops.get(name, 0), outputs.get(name, 0)
        if params or macs or size:
            rows.append(LayerRow(name, type(module).__name__, params, macs // (2 * batch), size // batch, shapes.get(name, ())))
    return rows


def batch_size(inputs: tuple) -> int:
    """Images in the example inputs: the first dimension of the first tensor."""
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0 or len(first) == 0:
        raise UserError("The example inputs hold no tensor with a batch dimension, which cost is counted by.")
    return len(first)


def _run(model: nn.Module, inputs: tuple) -> tuple[dict[str, int], dict[str, int], dict[str, tuple[int, ...]]]:
    """FLOPs without those of inner modules, bytes of outputs (of leaves) and output shape, by module name."""
    counter = FlopCounterMode(display=False)
    flops: dict[str, int] = {}
    outputs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    # One entry per running forward pass: the counter when it began, and what its inner modules have spent.
    running: list[list[int]] = []

    def enter(module: nn.Module, args: tuple) -> None:
        running.append([counter.get_total_flops(), 0])

    def leave(name: str, is_leaf: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            start, inner = running.pop()
            spent = counter.get_total_flops() - start
            flops[name] = flops.get(name, 0) + spent - inner
            if running:
                running[-1][1] += spent
            results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if results:
                shapes[name] = tuple(results[0].shape)
            if is_leaf:
                given = {_memory(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
                fresh = {_memory(leaf): leaf for leaf in results if _memory(leaf) not in given}
                outputs[name] = outputs.get(name, 0) + sum(leaf.numel() * leaf.element_size() for leaf in fresh.values())

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave(name, not any(True for _ in module.children()))))
        with undisturbed(model), _countable(), counter:
            model(*differentiable(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return flops, outputs, shapes


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """Every matrix product as an operator of its own: no fused attention, no fused transformer layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
