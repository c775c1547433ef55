"""What the functions for use from Python are given: every fault found before work starts, one sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves

from compress.errors import UserError


def unusable(model: nn.Module) -> str | None:
    """Why the tensors of `model` cannot be worked with, as one sentence; None where they can."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            return f"Tensor {name!r} of the network has no shape yet; run the network once on an input first."
        if tensor.is_meta:
            return f"Tensor {name!r} of the network is on the meta device and has no values; build the network on a real device."
        if tensor.is_inference():
            return f"Tensor {name!r} of the network was made under torch.inference_mode, which forbids gradients for good; build the network outside of it."
    return None


def empty(example_inputs: Any) -> str | None:
    """Why no network can be traced or counted with these inputs, as one sentence; None where there is no such reason."""
    for leaf in tree_leaves(example_inputs):
        if isinstance(leaf, Tensor) and not leaf.numel():
            return f"example_inputs hold a tensor of shape {list(leaf.shape)}, which has no element; give at least one input."
        if isinstance(leaf, Tensor) and leaf.is_meta:
            return "example_inputs hold a tensor on the meta device; give one with values."
    return None


def is_number(value: Any, kind: type = int) -> bool:
    """Whether `value` is an int (or, for kind float, any real number) and not a bool."""
    return not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float))


def patterns(exclude: Any) -> tuple[str, ...]:
    """`exclude` as a tuple of patterns, none for None; UserError where it is neither a string nor strings."""
    if exclude is None:
        return ()
    found = (exclude,) if isinstance(exclude, str) or not isinstance(exclude, Iterable) else tuple(exclude)
    for pattern in found:
        if not isinstance(pattern, str):
            raise UserError(f"exclude takes name patterns such as 'layer1.*', and holds {pattern!r}.")
    return found


def check(model: Any, example_inputs: Any, method: Any, options: Any, loss_fn: Any, seed: Any, max_layer_ratio: Any, round_to: Any) -> None:
    """Raise one UserError with all faults of the arguments of `compress` that need no look at the method."""
    faults = []
    if not isinstance(model, nn.Module):
        faults.append(f"The network is a {type(model).__name__}, expected a torch.nn.Module.")
    elif reason := unusable(model):
        faults.append(reason)
    if reason := empty(example_inputs):
        faults.append(reason)
    if not isinstance(method, str):
        faults.append(f"method is a name such as 'l1', and is {method!r}.")
    if options is not None and not (isinstance(options, dict) and all(isinstance(key, str) for key in options)):
        faults.append(f"options is a dictionary from names to values, and is {options!r}.")
    if loss_fn is not None and not callable(loss_fn):
        faults.append(f"loss_fn is a function of outputs and labels, and is {loss_fn!r}.")
    if not is_number(seed) or not -2**63 <= seed < 2**63:
        faults.append(f"seed is an integer of at most 64 bits, and is {seed!r}.")
    if not is_number(max_layer_ratio, float) or not 0 < max_layer_ratio <= 1:
        faults.append(f"max_layer_ratio is the largest fraction removed from a group, in (0, 1], and is {max_layer_ratio!r}.")
    if not is_number(round_to) or round_to < 1:
        faults.append(f"round_to is an integer of at least 1, and is {round_to!r}.")
    if faults:
        raise UserError(*faults)
