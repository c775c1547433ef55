"""Which layers of a network a factorization may replace, and why the others stay."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compress.decompose.modules import FactorizedConv2d, FactorizedLinear, factorizable

BLOCKS = (FactorizedConv2d, FactorizedLinear)
# A block needs equal ranks in all groups, and a depthwise convolution has no rank to lose: of ResNeXt-50's parameters 6 % are grouped.
GROUPED = "a convolution in groups; `factorize` decomposes it, with equal ranks in all groups"
READ = "the module around it reads its weight and never calls it"


def candidates(model: nn.Module, exclude: Sequence[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layers that may be replaced by name, reason by name for every other Linear or convolution).

    May be replaced: Linear and ungrouped Conv2d (exactly these types) and blocks, unless a pattern of `exclude` matches the name.
    """
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if (inside and name.startswith(inside)) or not isinstance(module, (nn.Linear, _ConvNd, *BLOCKS)):
            continue
        if isinstance(module, BLOCKS):
            inside = (*inside, f"{name}.")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            reasons[name] = "excluded"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            reasons[name] = READ
        elif not factorizable(module):
            reasons[name] = f"a {type(module).__name__}, not exactly Linear or Conv2d"
        elif getattr(module, "groups", 1) != 1:
            reasons[name] = GROUPED
        else:
            found[name] = module
    return found, reasons


def targets(model: nn.Module, skip_last: bool = True, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Layers that EigenDamage takes: name -> name whose statistics it needs (a three-factor block's core, else the layer itself).

    Left out, besides what `candidates` leaves out: the last linear layer with `skip_last`, and blocks of other forms.
    """
    return _targets(model, skip_last, exclude)[0]


def left_alone(model: nn.Module, skip_last: bool = True, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Layers that EigenDamage does not take, by name, with the reason."""
    return _targets(model, skip_last, exclude)[1]


def _targets(model: nn.Module, skip_last: bool, exclude: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    layers, reasons = candidates(model, exclude)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BLOCKS))
    linear = [name for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, FactorizedLinear)) and not (inside and name.startswith(inside))]
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
