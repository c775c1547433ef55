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


def _in_scope(module: nn.Module, parameter: str, scope: str) -> bool:
    if scope == "all-weights":
        return parameter == "weight"
    if isinstance(module, _ConvNd):
        return parameter == "weight"
    if scope == "conv":
        return False
    if isinstance(module, nn.MultiheadAttention):
        return parameter.endswith("proj_weight")
    return isinstance(module, nn.Linear) and parameter == "weight"


def select_parameters(model: nn.Module, scope: str, exclude: Sequence[str] = (), biases: bool = False) -> list[str]:
    """Names of the parameters in `scope`, in the order of the network, each shared parameter once.

    `exclude`: patterns (fnmatch) of layer names or parameter names that stay dense. `biases` adds the
    biases of the layers in scope. Raises `UserError` for an unknown scope and for a scope
    that matches nothing.
    """
    if scope not in SCOPES:
        raise UserError(f"Unknown mask scope {scope!r}{nearest(scope, list(SCOPES))}; known: {', '.join(SCOPES)}.")
    names, seen = [], set()
    for layer, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{layer}.{short}" if layer else short
            kept_dense = any(fnmatch(layer, pattern) or fnmatch(name, pattern) for pattern in exclude)
            wanted = "weight" if biases and short == "bias" else short
            if _in_scope(module, wanted, scope) and not kept_dense and id(parameter) not in seen:
                seen.add(id(parameter))
                names.append(name)
    if not names:
        left = f" outside of exclude={list(exclude)}" if exclude else ""
        raise UserError(f"Mask scope {scope!r} matches no parameter of {type(model).__name__}{left}; choose another scope.")
    return names
