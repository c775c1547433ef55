"""Which rows of a layer's input belong to which image.

A linear layer reads [..., features]. The images are often its first dimension, in sequence-first layers the second, and they may be
folded together with positions into one dimension, outer x images x inner (windows of an image: inner; a flattened sequence-first tensor:
outer). A convolution reads [rows, channels, h, w] and may find several frames of an image among its rows. Where the images are is seen
by running two and four of them: the dimension that grows is theirs, and the rows of the first two are the same in both runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.curvature.capture import Tape, preserved
from compress.curvature.geometry import geometry
from compress.errors import UserError

FEW, MORE = 2, 4  # not 1: networks squeeze dimensions of size one


@dataclass(frozen=True)
class Place:
    """Dimension `axis` of an input has the size outer x images x inner."""

    axis: int
    outer: int
    inner: int


class ImageRows:
    """Brings the images of a batch to the front of the layers' inputs and output gradients; `start` names the batch."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self._model, self._modules = model, modules
        self._convolutions = {name: geometry(module).convolution for name, module in modules.items()}
        self._known: dict[Any, dict[str, list[Place | None]]] = {}
        self._places: dict[str, list[Place | None]] = {}
        self._images = 1

    def start(self, arguments: tuple, images: int) -> None:
        """The batch that follows; inputs of a new size cost a forward pass of six images. Not to be called while a `Tape` watches."""
        self._images = images
        if images > 1:
            sizes = tuple(tuple(part.shape[1:]) if isinstance(part, Tensor) else None for part in arguments)
            if sizes not in self._known:
                self._known[sizes] = self._measure(arguments, images)
            self._places = self._known[sizes]

    def split(self, name: str, call: int, x: Tensor) -> Tensor:
        """An input, or an output's gradient, of the layer's call number `call` as [images, k, channels, h, w], k h w values per channel.

        Raises
        ------
        UserError: no dimension, or no unique one, is that of the images.
        """
        convolution = self._convolutions[name]
        if convolution and x.ndim == 3:
            x = x.unsqueeze(0)
        if self._images == 1:
            return x.unsqueeze(0) if convolution else x.reshape(1, 1, -1, x.shape[-1]).transpose(2, 3).unsqueeze(3)
        places = self._places.get(name, [])
        place = places[call] if call < len(places) else None
        if place is None or x.shape[place.axis] != place.outer * self._images * place.inner:
            raise UserError(
                f"Which rows of layer {name!r} belong to which image of a batch is not clear, so that no image has its own gradient; "
                "exclude it."
            )
        front = _front(x, place, self._images)
        return front.flatten(1, 2) if convolution else front.reshape(self._images, 1, -1, x.shape[-1]).transpose(2, 3).unsqueeze(3)

    def _measure(self, arguments: tuple, images: int) -> dict[str, list[Place | None]]:
        few, more = (self._inputs(arguments, images, count) for count in (FEW, MORE))
        return {
            name: [self._place(name, a, b) for a, b in zip(few[name], more[name], strict=True)]
            for name in few
            if len(few[name]) == len(more[name])  # the number of calls may depend on the images
        }

    def _inputs(self, arguments: tuple, images: int, count: int) -> dict[str, list[Tensor]]:
        """What the layers read when the network runs `count` images of the batch (some of them twice where it has fewer)."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._modules}
        chosen = torch.arange(count) % images
        parts = [part[chosen.to(part.device)] if isinstance(part, Tensor) and len(part) == images else part for part in arguments]
        with preserved(self._model), torch.no_grad(), Tape(self._modules, lambda name, x: found[name].append(x.clone()), None):
            self._model(*parts)
        return found

    def _place(self, name: str, few: Tensor, more: Tensor) -> Place | None:
        grown = [axis for axis, (a, b) in enumerate(zip(few.shape, more.shape, strict=False)) if a != b]
        if few.ndim != more.ndim or len(grown) != 1 or (self._convolutions[name] and grown != [0]):
            return None
        axis = grown[0]
        share = few.shape[axis] // FEW
        if few.shape[axis] != FEW * share or more.shape[axis] != MORE * share:
            return None
        places = [Place(axis, outer, share // outer) for outer in range(1, share + 1) if share % outer == 0]
        if len(places) == 1:
            return places[0]
        # batches of other sizes round differently, but a wrong order compares different rows
        errors = [float((_front(few, place, FEW) - _front(more, place, MORE)[:FEW]).double().norm()) for place in places]
        best, second = sorted(errors)[:2]
        return places[errors.index(best)] if best < second / 10 else None


def _front(x: Tensor, place: Place, images: int) -> Tensor:
    """[images, outer, inner, all other dimensions]."""
    return x.movedim(place.axis, 0).unflatten(0, (place.outer, images, place.inner)).movedim(1, 0)
