"""Which networks there are: names to builders, with the facts a configuration check needs.

A family file registers its builders with `register`. A builder is called as `builder(num_classes=..., in_channels=..., **options)`; its
other keyword arguments are its options, found by introspection, so that an unknown option is refused with the nearest one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.errors import UserError
from compress.registry import Registry, nearest

from . import torchvision_models
from .options import whole

Builder = Callable[..., nn.Module]
SizeRule = Callable[[Mapping[str, Any]], int | None]


@dataclass(frozen=True)
class ModelInfo:
    """Facts about one network with given options.

    `min_size`: the smallest image side (pixels) that it accepts. `exact_size`: the only side that it accepts, or None. `options`: every
    option with its value. `family`: the file that defines it, without `.py`.
    """

    name: str
    family: str
    min_size: int
    exact_size: int | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One registered network: the builder, the arguments that its name fixes, and the defaults that its name changes."""

    builder: Builder
    family: str
    min_size: int | SizeRule
    exact_size: SizeRule | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Every option of the network with its default."""
        parameters = inspect.signature(self.builder).parameters
        own = {key: p.default for key, p in parameters.items() if key not in ("num_classes", "in_channels", *self.fixed)}
        return own | self.defaults


MODELS: Registry[Entry] = Registry("model", __package__)


def register(
    name: str,
    *,
    family: str,
    min_size: int | SizeRule,
    exact_size: SizeRule | None = None,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Builder], Builder]:
    """Decorator that makes a builder known under `name`; `fixed` arguments are no options, `defaults` replace the builder's own."""

    def store(builder: Builder) -> Builder:
        MODELS.register(name)(Entry(builder, family, min_size, exact_size, dict(fixed or {}), dict(defaults or {})))
        return builder

    return store


def names() -> list[str]:
    """The names of the networks defined here, sorted; torchvision's are not among them."""
    return MODELS.names()


def _entry(name: str) -> Entry:
    if name not in MODELS:
        known = names() + [torchvision_models.PREFIX + other for other in torchvision_models.names()]
        raise UserError(f"Unknown model {name!r}{nearest(name, known)}; known: {', '.join(names())}, torchvision/<name>.")
    return MODELS[name]


def _merge(name: str, entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    known = entry.options()
    for key in options:
        if key not in known:
            allowed = ", ".join(known) if known else "none"
            raise UserError(f"Model {name!r} has no option {key!r}{nearest(key, list(known))}; its options: {allowed}.")
    return known | dict(options)


def build(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """A network with fresh initial weights, drawn from PyTorch's global generator.

    Parameters
    ----------
    name:
        One of `names()`, or `torchvision/<name>`.
    num_classes:
        Width of the output: `[batch, in_channels, height, width] -> [batch, num_classes]`.
    in_channels:
        Channels of the images.
    options:
        Keyword arguments of the builder (`info(name).options` lists them); for torchvision those of its constructor.

    Raises
    ------
    UserError
        For an unknown model or option (with the nearest name) and for a value outside its range.
    """
    whole("num_classes", num_classes)
    whole("in_channels", in_channels)
    if name.startswith(torchvision_models.PREFIX):
        model = torchvision_models.build(name, num_classes, in_channels, options)
    else:
        entry = _entry(name)
        model = entry.builder(num_classes=num_classes, in_channels=in_channels, **entry.fixed, **_merge(name, entry, options))
    # What `build(**model.build_spec)` needs to make this architecture again; a saved network carries it.
    model.build_spec = {"name": name, "num_classes": num_classes, "in_channels": in_channels, **options}
    return model


def info(name: str, **options: Any) -> ModelInfo:
    """What a configuration check needs to know about `build(name, ..., **options)`; nothing is built.

    Raises
    ------
    UserError
        For an unknown model or option, with the nearest name.
    """
    if name.startswith(torchvision_models.PREFIX):
        minimum, exact = torchvision_models.sizes(name, options)
        return ModelInfo(name, "torchvision_models", minimum, exact, dict(options))
    entry = _entry(name)
    merged = _merge(name, entry, options)
    minimum = entry.min_size if isinstance(entry.min_size, int) else entry.min_size(merged)
    exact = entry.exact_size(merged) if entry.exact_size is not None else None
    return ModelInfo(name, entry.family, minimum, exact, merged)
