"""The dispatch mode that watches one forward pass and hands every ATen call to its label rule.

A rule is a function `rule(trace, call)` registered under the operator's name without "aten." and without the underscore of in-place
variants. It reads the labels of the call's tensors, joins or pins atoms, and sets the labels of the outputs. An operator without a
rule pins every label that reaches it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from compress.graph.labels import Array, Atoms, Labels
from compress.graph.records import Assumption, Cost, Count

Rule = Callable[["Trace", "Call"], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these operators."""

    def store(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return store


class Call:
    """One ATen call: `call["dim"]` is the argument of that name in the operator's schema, given or default."""

    def __init__(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        self.func, self.out, self._args, self._kwargs = func, out, args, kwargs
        self.op = func._schema.name.split("::")[1]
        self.name = self.op[:-1] if self.op.endswith("_") and not self.op.endswith("__") else self.op

    def __getitem__(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self._args[position] if position < len(self._args) else argument.default_value
        raise KeyError(name)

    def has(self, name: str) -> bool:
        """Whether the operator has an argument of this name."""
        return any(argument.name == name for argument in self.func._schema.arguments)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self._args, self._kwargs)) if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return [leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor)]


_OWN = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def program_line() -> str:
    """ "file:number" of the innermost line of the program that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Trace:
    """What is known while the network runs: labels of live tensors, atoms, costs, module attributes, guesses.

    `history` holds the program's line and the label arrays that reached it for every call.
    `choices` maps a site (the running number of the call, and of the guess within it) to the option taken there.
    """

    def __init__(self, choices: dict[tuple[int, int], int]) -> None:
        self.atoms = Atoms()
        self.choices = choices
        self.assumptions: list[Assumption] = []
        self.costs: list[Cost] = []
        self.counts: list[Count] = []
        self.grouped: dict[str, str] = {}
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls = self._guesses = 0
        self.history: list[tuple[str, list[Array]]] = []
        self.touched: set[str] = set()
        self._tensors = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor | None) -> Labels:
        """The labels of a tensor (empty where it has none)."""
        return (self._tensors.get(tensor) if tensor is not None else None) or Labels()

    def set(self, tensor: Tensor, dims: dict[int, Array | None], source: str | None = None) -> None:
        """Gives a tensor its labels; entries that are None and dimensions of size 1 are left out."""
        kept = {dim: atoms for dim, atoms in dims.items() if atoms is not None and tensor.shape[dim] > 1}
        for dim, atoms in kept.items():
            if len(atoms) != tensor.shape[dim]:
                raise AssertionError(f"{len(atoms)} labels for dimension {dim} of {tuple(tensor.shape)}")
        self._tensors[tensor] = Labels(kept, source)

    def source(self, *tensors: Tensor | None) -> str | None:
        """The source of a tensor computed from these."""
        sources = [self.of(tensor).source for tensor in tensors if tensor is not None]
        return None if not sources or any(source is None for source in sources) else next((s for s in sources if s), "")

    def where(self, call: Call) -> str:
        """The operator, the module it runs in and the program's line, for reasons."""
        module = self.stack[-1][0] if self.stack else ""
        return f"aten.{call.op}{f' in {module}' if module else ''}, {self.history[-1][0]}"

    def pin(self, labels: Labels, reason: str) -> None:
        """Pins every label of a tensor."""
        for atoms in labels.dims.values():
            self.atoms.pin(atoms, reason)

    def merge(self, arrays: list[Array | None], reason: str) -> Array | None:
        """Joins label arrays of one size; one that is missing (a fixed dimension) pins the others."""
        present = [atoms for atoms in arrays if atoms is not None]
        if not present:
            return None
        for atoms in present[1:]:
            self.atoms.join(present[0], atoms)
        if len(present) < len(arrays):
            self.atoms.pin(present[0], reason)
        return present[0]

    def choose(self, call: Call, options: int, atoms: list[Array]) -> int:
        """Which of `options` readings of a constant to take here; the last one always means: pin."""
        self._guesses += 1
        site = (self.calls, self._guesses)
        choice = min(self.choices.get(site, 0), options - 1)
        self.assumptions.append(Assumption(site, options, choice, self.where(call), self.history[-1][0], atoms))
        return choice

    def module(self, *classes: type) -> tuple[str, nn.Module] | None:
        """The innermost running module if it is of one of these classes."""
        return self.stack[-1] if self.stack and isinstance(self.stack[-1][1], classes) else None

    def apply(self, call: Call) -> None:
        """Runs the rule of one call."""
        self.calls, self._guesses = self.calls + 1, 0
        reached = [self.of(tensor) for tensor in call.tensors()]
        self.history.append((program_line(), [atoms for labels in reached for atoms in labels.dims.values()]))
        self.touched.update(labels.source for labels in reached if labels.source)
        function = RULES.get(call.name)
        if function is None and torch.Tag.pointwise in call.func.tags:
            function = RULES["pointwise"]
        if function is not None:
            try:
                function(self, call)
            except Exception as error:  # a form of the operator that its rule does not know must not end in a wrong cut
                self._refuse(call, f"the rule does not cover this use of {self.where(call)}: {type(error).__name__}")
            return
        self._refuse(call, f"no rule for {self.where(call)}")
        formula = flop_registry.get(call.func.overloadpacket)
        if formula is not None:
            self.costs.append(Cost("", formula(*call._args, **call._kwargs, out_val=call.out) // 2, []))

    def _refuse(self, call: Call, reason: str) -> None:
        """Pins everything that goes into an operator; nothing that comes out of it can be removed."""
        for tensor in call.tensors():
            self.pin(self.of(tensor), reason)
        for tensor in call.outputs():
            self._tensors.pop(tensor, None)


class LabelMode(TorchDispatchMode):
    """Carries out every operator unchanged and tells the trace about it."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.trace.apply(Call(func, args, kwargs, out))
        return out


def aligned(labels: Labels, shape: torch.Size, out_dim: int, out_ndim: int, size: int) -> tuple[bool, Array | None]:
    """Whether an operand spans dimension `out_dim` of a broadcast result, and its labels there."""
    dim = out_dim - (out_ndim - len(shape))
    if dim < 0 or shape[dim] != size:
        return False, None
    return True, labels.dims.get(dim)


def constant_rows(atoms: Array, axis: int) -> bool:
    """Whether an array of atoms does not vary along an axis."""
    return bool((atoms == np.take(atoms, [0], axis)).all())
