"""Masks as boolean buffers `<parameter>_mask` beside their parameters: True where the weight is kept.

A mask only ever loses entries. It is enforced by multiplication after every optimizer step; the optimizer's moment buffers are masked
too, so that stale momentum cannot move a pruned weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compress.errors import UserError
from compress.masks.scope import select_parameters

SUFFIX = "_mask"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, short = name.rpartition(".")
    return model.get_submodule(layer), short


def add_buffers(model: nn.Module, names: Sequence[str]) -> None:
    """Give the parameters `names` all-True mask buffers; one that is already there stays."""
    for name in names:
        module, short = _owner(model, name)
        if short + SUFFIX not in module._buffers:
            module.register_buffer(short + SUFFIX, torch.ones_like(getattr(module, short), dtype=torch.bool))


def mask_names(model: nn.Module) -> list[str]:
    """Names of the parameters of `model` that have mask buffers."""
    parameters = dict(model.named_parameters())
    found = [name[: -len(SUFFIX)] for name, buffer in model.named_buffers() if name.endswith(SUFFIX) and buffer.dtype == torch.bool]
    return [name for name in found if name in parameters]


def enforced(model: nn.Module) -> AbstractContextManager[None]:
    """`Masks.of(model).enforced()`, or nothing where the network carries no masks: what a training loop wraps its steps in."""
    return Masks.of(model).enforced() if mask_names(model) else nullcontext()


class Masks:
    """The masks of one network, bound to its parameters.

    Build them with `attach` (all True) or `of` (those the network already carries).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], scope: str | None = None) -> None:
        self.model = model
        self.names = list(names)
        self.scope = scope
        self._slots = {name: _owner(model, name) for name in self.names}
        self._factors: tuple[tuple, list[Tensor], list[Tensor]] | None = None

    @classmethod
    def attach(
        cls, model: nn.Module, scope: str = "conv+linear", exclude: Sequence[str] = (), biases: bool = False, residual: bool = False
    ) -> Masks:
        """Give every parameter in `scope` an all-True mask buffer; a mask that is already there stays. See `select_parameters`."""
        names = select_parameters(model, scope, exclude, biases, residual)
        add_buffers(model, names)
        return cls(model, names, scope)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """The masks that `model` carries (after `copy.deepcopy`, say); `UserError` where it has none."""
        names = mask_names(model)
        if not names:
            raise UserError(f"{type(model).__name__} carries no masks; call Masks.attach first.")
        return cls(model, names)

    def parameter(self, name: str) -> nn.Parameter:
        """The masked parameter of this name."""
        module, short = self._slots[name]
        return getattr(module, short)

    def __getitem__(self, name: str) -> Tensor:
        module, short = self._slots[name]
        return module._buffers[short + SUFFIX]

    def factors(self) -> list[Tensor]:
        """The masks as numbers of the parameters' types, made anew only where a mask has changed: a step multiplies by them."""
        pairs = [(self.parameter(name), self[name]) for name in self.names]
        key = tuple((id(mask), mask._version, mask.device, parameter.dtype) for parameter, mask in pairs)
        if self._factors is None or self._factors[0] != key:
            # The masks are held with their factors, so that no other tensor can come to have their identity.
            self._factors = key, [mask.to(parameter.dtype) for parameter, mask in pairs], [mask for _, mask in pairs]
        return self._factors[1]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of parameter name and mask."""
        return ((name, self[name]) for name in self.names)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all masks."""
        return {name: mask.clone() for name, mask in self.items()}

    def state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Copies of all weights and masks, for `restore`."""
        return {name: (self.parameter(name).detach().clone(), mask.clone()) for name, mask in self.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put back what `state` returned."""
        for name, (weight, mask) in state.items():
            self.parameter(name).copy_(weight)
            self[name].copy_(mask)

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Take over smaller masks and zero the weights they drop; `ValueError` where a mask would bring a weight back."""
        for name, mask in masks.items():
            if mask.shape != self[name].shape:
                raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, its parameter {tuple(self[name].shape)}")
            if bool((mask & ~self[name]).any()):
                raise ValueError(f"the new mask of {name!r} would bring pruned weights back")
        self.replace(masks)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Set masks without the nesting check (after rewinding, shuffling or loading) and zero the weights they drop."""
        for name, mask in masks.items():
            self[name].copy_(mask)
        self.apply()

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Zero the pruned weights, of `model` where one is given (an average of weights, a copy)."""
        target = self.model if model is None else model
        for name, mask in self.items():
            target.get_parameter(name).mul_(mask)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the pruned weights and their entries in the optimizer's state; call it after every `optimizer.step()`."""
        values, factors = [], []
        for name, factor in zip(self.names, self.factors(), strict=True):
            parameter = self.parameter(name)
            moments = optimizer.state.get(parameter, {}).values()
            found = [parameter, *(value for value in moments if isinstance(value, Tensor) and value.shape == parameter.shape)]
            values += found
            factors += [factor] * len(found)
        torch._foreach_mul_(values, factors)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Within it, `after_step` follows every step of any optimizer that trains a masked parameter (a training loop of any kind)."""
        own = {id(self.parameter(name)) for name in self.names}

        def hook(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                self.after_step(optimizer)

        handle = register_optimizer_step_post_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def make_permanent(self) -> None:
        """Zero the pruned weights and drop the mask buffers; the network is then an ordinary one with zeros in it."""
        self.apply()
        for name in self.names:
            module, short = _owner(self.model, name)
            del module._buffers[short + SUFFIX]
        self.names = []

    @property
    def total(self) -> int:
        """Number of weights under masks."""
        return sum(mask.numel() for _, mask in self.items())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(mask.sum()) for _, mask in self.items())

    @property
    def density(self) -> float:
        """Kept weights over weights under masks."""
        return self.kept / self.total

    def layer_density(self) -> dict[str, float]:
        """Density per parameter."""
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.items()}
