"""torchvision's classification networks as `torchvision/<name>`, with fresh weights and any number of input channels.

Options are those of the constructor in torchvision (`dropout`, `image_size`, ...). GoogLeNet and Inception are built without their
auxiliary classifiers, so that training and evaluation give one output. For other than 3 input channels the first convolution is replaced.
Initialisation: torchvision's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.errors import UserError
from compress.registry import nearest

from .options import whole

PREFIX = "torchvision/"
_AUXILIARY = ("googlenet", "inception_v3")


def names() -> list[str]:
    """torchvision's classification networks, without the prefix."""
    import torchvision  # imported here because it takes seconds, and most networks do without it

    return torchvision.models.list_models(module=torchvision.models)


def _bare(name: str) -> str:
    bare, known = name.removeprefix(PREFIX), names()
    if bare not in known:
        raise UserError(f"torchvision has no classification network {bare!r}{nearest(bare, known)}.")
    return bare


def _replace_stem(model: nn.Module, in_channels: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            stem = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            model.set_submodule(name, stem)
            return


def build(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """torchvision's network `name` (with the prefix), fresh weights, `[n, in_channels, h, w] -> [n, num_classes]`.

    Raises
    ------
    UserError
        For an unknown network (with the nearest name), and for options that its constructor refuses.
    """
    bare = _bare(name)
    for key in ("weights", "progress", "num_classes", "aux_logits"):
        if key in options:
            raise UserError(f"Option {key!r} of model {name!r} is set by this toolkit; remove it from the model's options.")
    fixed = {"aux_logits": False, "init_weights": True} if bare in _AUXILIARY else {}
    from torchvision.models import get_model

    try:
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce the slow initialisation that is asked for.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_model(bare, weights=None, num_classes=num_classes, **(fixed | dict(options)))
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(f"Model {name!r} refused its options ({given}): {error}.") from error
    if in_channels != 3:
        _replace_stem(model, in_channels)
    return model


_MIN_SIZES = {
    "alexnet": 63,
    "convnext": 32,
    "densenet": 29,
    "googlenet": 15,
    "inception_v3": 75,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
    "swin": 4,
    "vgg": 32,
}


def sizes(name: str, options: Mapping[str, Any]) -> tuple[int, int | None]:
    """(smallest image side, the only accepted side or None), in pixels, of torchvision's network `name` (with the prefix).

    Raises
    ------
    UserError
        For an unknown network (with the nearest name), and for an image size that is none.
    """
    bare = _bare(name)
    if bare.startswith("vit"):
        side = whole("image_size", options.get("image_size", 224))
        return side, side
    if bare.startswith("maxvit"):
        given = options.get("input_size", (224, 224))
        if not isinstance(given, list | tuple) or len(given) != 2:
            raise UserError(f"Option 'input_size' of model {name!r} is {given!r}; expected [height, width].")
        side = whole("input_size", given[0])
        return side, side
    return next((size for prefix, size in _MIN_SIZES.items() if bare.startswith(prefix)), 1), None
