"""Which parameters a mask may touch.

Presets: `conv` (weights of all convolutions), `conv+linear` (and of all linear layers, attention projections included) and
`all-weights` (every parameter called `weight`, normalisation scales included). Biases are masked only where asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compress.errors import UserError
from compress.registry import nearest

SCOPES = ("conv", "conv+linear", "all-weights")


def _in_scope(module: nn.Module, parameter: str, scope: str, residual: bool) -> bool:
    if getattr(module, "skip_scale", False):
        return residual and parameter == "weight"
    if scope == "all-weights":
        return parameter == "weight"
    if isinstance(module, _ConvNd):
        return parameter == "weight"
    if scope == "conv":
        return False
    if isinstance(module, nn.MultiheadAttention):
        return parameter.endswith("proj_weight")
    return isinstance(module, nn.Linear) and parameter == "weight"


def select_parameters(
    model: nn.Module, scope: str, exclude: Sequence[str] = (), biases: bool = False, residual: bool = False
) -> list[str]:
    """Names of the parameters in `scope`, in the order of the network, each shared parameter once.

    `exclude`: patterns (fnmatch) of layer names or parameter names that stay dense. `biases` adds the biases of the layers in scope,
    `residual` the scales on skip paths (modules with a true attribute `skip_scale`: those of our ResNets built with the option of that name).
    Raises `UserError` for an unknown scope, for a scope that matches nothing, and for `residual` where there is no such scale.
    """
    if scope not in SCOPES:
        raise UserError(f"Unknown mask scope {scope!r}{nearest(scope, list(SCOPES))}; known: {', '.join(SCOPES)}.")
    names, seen = [], set()
    for layer, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{layer}.{short}" if layer else short
            kept_dense = any(fnmatch(layer, pattern) or fnmatch(name, pattern) for pattern in exclude)
            wanted = "weight" if biases and short == "bias" else short
            if _in_scope(module, wanted, scope, residual) and not kept_dense and id(parameter) not in seen:
                seen.add(id(parameter))
                names.append(name)
    if residual and not any(getattr(module, "skip_scale", False) for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} has no scales on its skip paths to prune; build a ResNet of this toolkit with the option skip_scale."
        )
    if not names:
        left = f" outside of exclude={list(exclude)}" if exclude else ""
        raise UserError(f"Mask scope {scope!r} matches no parameter of {type(model).__name__}{left}; choose another scope.")
    return names
