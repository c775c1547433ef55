"""torch's encoder layer of transformers, with sparse layers in it.

In evaluation, without gradients, nn.TransformerEncoderLayer hands all weights to one fused operator and calls neither `linear1` nor `linear2`;
a sparse layer would be decoded to dense in every call. With `call_layers` it calls them. What the fused operator saved is lost then, so that an
encoder layer is measured as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from . import measure

READ = ("linear1", "linear2")


def encoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.TransformerEncoderLayer]]:
    """Name and module of every encoder layer, each module once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer))


def linears(layer: nn.TransformerEncoderLayer) -> dict[str, nn.Module]:
    """The modules whose weights the fused operator reads, by attribute; a subclass may lack them."""
    found = {own: getattr(layer, own, None) for own in READ}
    return {own: module for own, module in found.items() if isinstance(module, nn.Module)}


def call_layers(layer: nn.TransformerEncoderLayer) -> None:
    """Makes the encoder layer call its linear1 and linear2: this attribute says which activation the fused operator shall compute, and with 0
    there is none; the calls use the module `activation`. Copies and files of the layer keep it."""
    layer.activation_relu_or_gelu = 0


def slower(model: nn.Module, replacements: dict[str, nn.Module], calls: dict[str, tuple], margin: float,
           seconds: float) -> dict[str, str]:
    """{name in `replacements`: why that layer must stay dense}, for encoder layers that are not faster by `margin` with their sparse layers.

    replacements: sparse layers by their name in `model`. calls: (positional, keyword) arguments of one call of each encoder layer.
    """
    found: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for name, layer in encoder_layers(model):
        inside = {own: names[id(module)] for own, module in linears(layer).items()}
        inside = {own: path for own, path in inside.items() if path in replacements}
        if not inside or name not in calls:
            continue
        sparse = _replaced(layer, {own: replacements[path] for own, path in inside.items()})
        reason = _against(layer, sparse, *calls[name], margin, seconds)
        if reason:
            found |= dict.fromkeys(inside.values(), f"the encoder layer {name}".rstrip() + f" as a whole {reason}")
    return found


def _replaced(layer: nn.TransformerEncoderLayer, by: dict[str, nn.Module]) -> nn.TransformerEncoderLayer:
    """The layer with other modules in it, sharing everything else with `layer`."""
    other = copy.copy(layer)
    other._modules = {**layer._modules, **by}
    call_layers(other)
    return other


def _against(dense: nn.Module, sparse: nn.Module, args: tuple, keywords: dict, margin: float, seconds: float) -> str | None:
    """What speaks against `sparse`, or None."""
    def on(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: network(*args, **keywords)

    try:
        y, expected = (call() for call in (on(sparse), on(dense)))
        if y.is_nested:
            y, expected = (nested.to_padded_tensor(0.0) for nested in (y, expected))
        wrong = measure.differs(y, expected)
    except Exception as failure:
        wrong = measure.first_line(failure)
    if wrong:
        return f"cannot use its sparse layers: {wrong}"
    for before, after, _ in measure.network_times((dense, sparse), args, seconds, keywords):
        if not after * (1 + margin) < before:
            return f"took {after:.0f} us with its sparse layers, for which torch's fused operator must be off, and {before:.0f} us without"
    return None
