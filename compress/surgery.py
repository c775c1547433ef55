"""Carries out the "prune" step of a plan on a network, all or nothing.

A step is pure data: `{"kind": "prune", "slices": {parameter: {dim: [removed indices]}}, "attributes": {module: {attribute: value}}}`.
Tensors are cut behind their `Parameter` objects, so that ties, optimiser references, `requires_grad`, data type, device and memory
format survive; `.grad` is dropped, because its shape no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError

Step = dict[str, Any]
Undo = Callable[[], None]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cut(tensor: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """`tensor` without the given indices of the given dimensions, in the same memory format."""
    data = tensor.detach()
    for dim, removed in dims.items():
        keep = torch.ones(data.shape[dim], dtype=torch.bool)
        keep[torch.as_tensor(removed, dtype=torch.long)] = False
        data = data.index_select(dim, keep.nonzero().flatten().to(data.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return data.contiguous(memory_format=torch.channels_last)
    return data.contiguous()


def _checked(model: nn.Module, slices: Mapping[str, Mapping[Any, list[int]]]) -> dict[str, tuple[Tensor, dict[int, list[int]]]]:
    """The tensors to cut, after every index was found to exist and every dimension to keep an index."""
    tensors = named_tensors(model)
    found = {}
    for name, given in slices.items():
        if name not in tensors:
            raise UserError(f"The plan removes channels of {name!r}, which this network does not have; "
                            "apply it to a freshly built, uncompressed network.")
        shape, dims = tuple(tensors[name].shape), {int(dim): list(indices) for dim, indices in given.items()}
        for dim, indices in dims.items():
            known = 0 <= dim < len(shape) and all(0 <= index < shape[dim] for index in indices)
            if not known or not indices or len(set(indices)) != len(indices):
                raise UserError(f"The plan removes indices of dimension {dim} of {name!r} that its shape {list(shape)} does not have; "
                                "apply it to a freshly built, uncompressed network.")
            if len(indices) == shape[dim]:
                raise UserError(f"The plan removes every index of dimension {dim} of {name!r}; at least one must stay.")
        found[name] = (tensors[name], dims)
    return found


def apply_prune(model: nn.Module, step: Step) -> Undo:
    """Cuts the network in place and returns a function that takes it all back.

    Raises UserError, with the network as it was, where the step does not fit it.
    """
    work = _checked(model, step["slices"])
    modules = dict(model.named_modules())
    for name, values in step["attributes"].items():
        for attribute in values:
            if name not in modules or not hasattr(modules[name], attribute):
                raise UserError(f"The plan sets {attribute!r} of module {name!r}, which this network does not have.")
    new = {name: cut(tensor, dims) for name, (tensor, dims) in work.items()}
    before = [(tensor, tensor.data, tensor.grad) for tensor, _ in work.values()]
    old = [(modules[name], attribute, getattr(modules[name], attribute), value)
           for name, values in step["attributes"].items() for attribute, value in values.items()]

    def undo() -> None:
        for tensor, data, grad in before:
            tensor.data, tensor.grad = data, grad
        for module, attribute, value, _ in old:
            setattr(module, attribute, value)

    try:
        for name, (tensor, _) in work.items():
            tensor.grad = None
            tensor.data = new[name]
        for module, attribute, value, given in old:
            setattr(module, attribute, tuple(given) if isinstance(value, tuple) else given)
    except BaseException:
        undo()
        raise
    return undo
