"""A clock that cannot scatter: the time of a network is worked out from the products of its layers and the number of their calls."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compress.latency import Comparison, Latency
from compress.undisturbed import arguments, undisturbed

NANO_PER_MAC, NANO_PER_CALL = 1.0, 300.0


def nanoseconds(model: nn.Module, inputs, depthwise: float = 1.0, call: float = NANO_PER_CALL, block: int = 1) -> float:
    """Time of one forward pass of the whole batch: a constant per call of a layer, and its MACs (BatchNorm: elements), those in groups `depthwise` times as slow.

    Channels of convolutions and linear layers count in whole blocks of `block`, as for kernels that work on vectors.
    """
    spent = [0.0]

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        if isinstance(module, _NormBase):
            products = output.numel()
        else:
            transposed = getattr(module, "transposed", False)
            products = module.weight[0].numel() * (args[0] if transposed else output).numel()
            out, into = output.shape[dim], args[0].shape[dim]
            products *= -(-out // block) * block / out
            if getattr(module, "groups", 1) == 1:
                products *= -(-into // block) * block / into
        spent[0] += call + NANO_PER_MAC * products * (depthwise if getattr(module, "groups", 1) > 1 else 1.0)

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear, _NormBase))]
    try:
        with undisturbed(model), torch.no_grad():
            model(*arguments(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return spent[0]


class Clock:
    """Takes the place of `compare` and `latency`; `seen` counts the networks that were timed."""

    def __init__(self, **rates: float) -> None:
        self.rates, self.seen = rates, 0

    def latency(self, model, inputs, seconds=0.3, threads=None, mode="eager"):
        self.seen += 1
        ms = nanoseconds(model, inputs, **self.rates) / 1e6
        return Latency(ms, ms, ms, 5)

    def compare(self, models, inputs, seconds=0.3, threads=None, mode="eager"):
        found = {name: self.latency(model, inputs) for name, model in models.items()}
        first = next(iter(found.values())).median_ms
        return {name: Comparison(one, *[first / one.median_ms] * 3) for name, one in found.items()}

    def compare_layers(self, variants, timing):
        self.seen += len(variants)
        found = {key: sum(nanoseconds(layer, x, **self.rates) for x in inputs) for key, (layer, inputs) in variants.items()}
        first = next(iter(found.values()))
        return first, {key: first / spent for key, spent in found.items()}

    def install(self, monkeypatch) -> "Clock":
        """Let all budgets of latency be measured by this clock."""
        for place in ("timing.compare", "timing.latency", "timed_menus.compare_layers", "timed_widths.compare_layers"):
            monkeypatch.setattr(f"compress.methods.{place}", getattr(self, place.split(".")[1]))
        return self
