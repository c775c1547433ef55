"""Adapters: attributes of modules that repeat a width, and how surgery rewrites them.

Two kinds. `attributes_of` derives attributes from the new shapes of a module's own parameters (`nn.Conv2d.out_channels`). The tables
`PADDING` and `SLICES` name modules whose `forward` reads a width from an attribute: the trace records which channels the attribute
counts, and surgery writes how many of them are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compress.graph.records import Count

if TYPE_CHECKING:
    from compress.graph.mode import Trace

Shape = tuple[int, ...]
ShapeOf = Callable[[str], "tuple[Shape, Shape] | None"]
Stack = list[tuple[str, nn.Module]]
Target = tuple[str, str]

# (end of the defining module's name, class name) -> attributes; by name, so that nothing is imported that the user does not use
PADDING: dict[tuple[str, str], tuple[str, str]] = {("models.layers", "PadShortcut"): ("front", "back")}
SLICES: dict[tuple[str, str], tuple[str, ...]] = {("models.dpn", "DualPathBlock"): ("split",)}


def _entry(table: dict[tuple[str, str], tuple[str, ...]], module: nn.Module) -> tuple[str, ...] | None:
    cls = type(module)
    for (place, name), attributes in table.items():
        if cls.__name__ == name and f".{cls.__module__}".endswith(f".{place}"):
            return attributes
    return None


def padding_attributes(stack: Stack, front: int, back: int) -> tuple[Target, Target] | None:
    """The attributes of the running module that hold how many channels are padded in front and behind."""
    if stack:
        name, module = stack[-1]
        names = _entry(PADDING, module)  # type: ignore[arg-type]
        if names is not None and tuple(getattr(module, attribute) for attribute in names) == (front, back):
            return (name, names[0]), (name, names[1])
    return None


def slice_attribute(stack: Stack, bound: int) -> Target | None:
    """The attribute of the running module that holds a slice bound."""
    if stack:
        name, module = stack[-1]
        for attribute in _entry(SLICES, module) or ():
            if getattr(module, attribute) == bound:
                return name, attribute
    return None


def on_enter(trace: Trace, name: str, module: nn.Module, args: tuple) -> None:
    """Counts the channels of parameter-free modules that store their number."""
    if isinstance(module, _NormBase) and not list(module.parameters(False)) and not list(module.buffers(False)) and args:
        atoms = trace.of(args[0]).dims.get(1)
        if atoms is not None and args[0].shape[1] == module.num_features:
            trace.counts.append(Count(name, "num_features", atoms))


def _conv(module: Any, shape_of: ShapeOf, way: str | None) -> dict[str, Any]:
    found = shape_of("weight")
    if found is None:
        return {}
    old, new = found
    groups = module.groups
    if way == "group":
        groups = module.groups * new[0] // old[0]
    widths = (new[0], new[1] * groups) if isinstance(module, _ConvTransposeNd) else (new[1] * groups, new[0])
    return {"in_channels": widths[0], "out_channels": widths[1], "groups": groups}


def _fields(**fields: tuple[str, int]) -> Callable[[Any, ShapeOf, str | None], dict[str, Any]]:
    """An adapter whose attributes are single sizes: attribute=(parameter, dimension)."""

    def adapter(module: Any, shape_of: ShapeOf, way: str | None) -> dict[str, Any]:
        values = {}
        for attribute, (parameter, dim) in fields.items():
            found = shape_of(parameter)
            if found is not None and hasattr(module, attribute):
                values[attribute] = found[1][dim]
        return values

    return adapter


def _norm(module: Any, shape_of: ShapeOf, way: str | None) -> dict[str, Any]:
    found = shape_of("weight") or shape_of("running_mean")
    return {} if found is None else {"num_features": found[1][0]}


def _normalized_shape(module: Any, shape_of: ShapeOf, way: str | None) -> dict[str, Any]:
    found = shape_of("weight")
    return {} if found is None else {"normalized_shape": list(found[1])}


def _prelu(module: Any, shape_of: ShapeOf, way: str | None) -> dict[str, Any]:
    found = shape_of("weight")
    return {} if found is None else {"num_parameters": found[1][0]}


ADAPTERS: list[tuple[type, Callable[[Any, ShapeOf, str | None], dict[str, Any]]]] = [
    (_ConvNd, _conv),
    (nn.Linear, _fields(out_features=("weight", 0), in_features=("weight", 1))),
    (nn.Bilinear, _fields(out_features=("weight", 0), in1_features=("weight", 1), in2_features=("weight", 2))),
    (nn.Embedding, _fields(num_embeddings=("weight", 0), embedding_dim=("weight", 1))),
    (_NormBase, _norm),
    (nn.LayerNorm, _normalized_shape),
    (nn.RMSNorm, _normalized_shape),
    (nn.GroupNorm, _fields(num_channels=("weight", 0))),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _fields(hidden_size=("weight_hh_l0", 1), input_size=("weight_ih_l0", 1))),
    (nn.RNNCellBase, _fields(hidden_size=("weight_hh", 1), input_size=("weight_ih", 1))),
]

# where a reparametrised module keeps the tensor that has the weight's shape
_STANDINS = ("{}", "parametrizations.{}.original", "parametrizations.{}.original1", "{}_v", "{}_orig")


def attributes_of(name: str, module: nn.Module, shapes: dict[str, tuple[Shape, Shape]], grouped: dict[str, str]) -> dict[str, Any]:
    """New attribute values of one module.

    Parameters
    ----------
    name: the module's name in the network.
    shapes: parameter or buffer name -> (shape before, shape after), for those that change.
    grouped: weight name -> "position" or "group", how a grouped convolution loses channels.
    """
    prefix = f"{name}." if name else ""

    def full(parameter: str) -> list[str]:
        return [prefix + pattern.format(parameter) for pattern in _STANDINS]

    def shape_of(parameter: str) -> tuple[Shape, Shape] | None:
        return next((shapes[candidate] for candidate in full(parameter) if candidate in shapes), None)

    for cls, adapter in ADAPTERS:
        if isinstance(module, cls):
            way = next((grouped[candidate] for candidate in full("weight") if candidate in grouped), None)
            values = adapter(module, shape_of, way)
            return {key: value for key, value in values.items() if _plain(getattr(module, key)) != value}
    return {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
