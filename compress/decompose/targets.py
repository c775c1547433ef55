"""Which layers of a network a factorization may replace, and why the others stay."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compress.cost import batch_size
from compress.curvature.capture import preserved
from compress.decompose.modules import Calls, FactorizedConv2d, FactorizedLinear, factorizable
from compress.undisturbed import arguments

BLOCKS = (FactorizedConv2d, FactorizedLinear)
# A block needs equal ranks in all groups, and a depthwise convolution has no rank to lose: of ResNeXt-50's parameters 6 % are grouped.
GROUPED = "a convolution in groups; `factorize` decomposes it, with equal ranks in all groups"
READ = "the module around it reads its weight and never calls it"
UNCALLED = "the network never calls it; its weight may be read elsewhere"


def observe(model: nn.Module, example: Any, kinds: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd, *BLOCKS)) -> dict[str, Calls]:
    """What every module of these kinds (linear layers, convolutions and blocks) is called with on `example`; those that are not called are left out."""
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    inputs, handles = arguments(example), []

    def note(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        shapes[name].append(tuple(given.shape))

    try:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                handles.append(module.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True))
        with preserved(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    images = batch_size(inputs)
    return {name: Calls(tuple(seen), images) for name, seen in shapes.items()}


def excluded(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the layer's name, that of a module around it, or one of its parameters."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)] + [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
    return any(fnmatch.fnmatchcase(each, pattern) for each in names for pattern in patterns)


def candidates(model: nn.Module, exclude: Sequence[str] = (), called: Collection[str] | None = None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layers that may be replaced by name, reason by name for every other Linear or convolution).

    May be replaced: Linear and ungrouped Conv2d (exactly these types) and blocks that are in `called` (see `observe`; None: all) and share no
    parameter with another module, unless a pattern of `exclude` matches it (see `excluded`).
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if (inside and name.startswith(inside)) or not isinstance(module, (nn.Linear, _ConvNd, *BLOCKS)):
            continue
        if isinstance(module, BLOCKS):
            inside = (*inside, f"{name}.")
        if excluded(name, module, exclude):
            reasons[name] = "excluded"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            reasons[name] = READ
        elif not factorizable(module):
            reasons[name] = f"a {type(module).__name__}, not exactly Linear or Conv2d"
        elif getattr(module, "groups", 1) != 1:
            reasons[name] = GROUPED
        elif called is not None and name not in called:
            reasons[name] = UNCALLED
        elif others := _sharing(name, module, owners):
            reasons[name] = f"shares a parameter with {', '.join(others)}, which a replacement would part"
        else:
            found[name] = module
    return found, reasons


def _sharing(name: str, module: nn.Module, owners: dict[int, list[str]]) -> list[str]:
    """Other modules that hold a parameter of the layer or block."""
    all_owners = dict.fromkeys(owner for parameter in module.parameters() for owner in owners[id(parameter)])
    return [repr(owner) if owner else "the network itself" for owner in all_owners if owner != name and not owner.startswith(f"{name}.")]


def targets(model: nn.Module, skip_last: bool = True, exclude: Sequence[str] = (), called: Collection[str] | None = None) -> dict[str, str]:
    """Layers that EigenDamage takes: name -> name whose statistics it needs (a three-factor block's core, else the layer itself).

    Left out, besides what `candidates` leaves out: the last linear layer (of those in `called`) with `skip_last`, and blocks of other forms.
    """
    return _targets(model, skip_last, exclude, called)[0]


def left_alone(model: nn.Module, skip_last: bool = True, exclude: Sequence[str] = (), called: Collection[str] | None = None) -> dict[str, str]:
    """Layers that EigenDamage does not take, by name, with the reason."""
    return _targets(model, skip_last, exclude, called)[1]


def _targets(model: nn.Module, skip_last: bool, exclude: Sequence[str], called: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    layers, reasons = candidates(model, exclude, called)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BLOCKS))
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, FactorizedLinear))
              and not (inside and name.startswith(inside)) and (called is None or name in called)]
    last = linear[-1] if skip_last and linear else None
    found = {}
    for name, module in layers.items():
        if name == last:
            reasons[name] = "the last linear layer (`skip_last`)"
        elif isinstance(module, BLOCKS) and (len(module) != 3 or module.factors().core is None or getattr(module, "depthwise", False)):
            reasons[name] = "a block without a core to rotate"
        else:
            found[name] = f"{name}.core" if isinstance(module, BLOCKS) else name
    return found, reasons
