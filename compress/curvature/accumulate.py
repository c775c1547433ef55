"""Running sums of one layer's statistics: what the hooks add to, what processes exchange, and the averages in the end."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.curvature.geometry import Geometry
from compress.curvature.layer_factors import LayerFactors
from compress.curvature.moments import (
    add_channels,
    add_gram,
    add_patches,
    add_rows,
    flat,
    mean_patches,
    mirror,
    natural_order,
    unfold_at,
    working,
)
from compress.curvature.processes import sum_, world

PATCHES = ("full", "channel", "pixel")
SHARINGS = ("expand", "reduce")


class Sums:
    """Float64 sums of one layer; see `collect` for the options.

    `input_rows` counts windows over all images, decayed like the sums; `arrivals` counts gradients that came back, zero ones too.
    """

    def __init__(
        self, name: str, geometry: Geometry, patch: str, sharing: str, bias: bool, positions: int | None, device: torch.device
    ) -> None:
        self.name, self.geometry, self.patch, self.sharing, self.positions = name, geometry, patch, sharing, positions
        self.by_patch = patch == "full" or geometry.offsets == 1
        self.bias = bias and geometry.bias and self.by_patch
        g = geometry.groups
        width = geometry.window if self.by_patch else geometry.channels // g
        double = {"dtype": torch.float64, "device": device}
        self.inputs, self.means = torch.zeros(g, width, width, **double), torch.zeros(g, width, **double)
        self.gradients = torch.zeros(g, geometry.outputs // g, geometry.outputs // g, **double)
        self.input_rows, self.arrivals = 0.0, 0
        self.input_shape: tuple[int, ...] = ()

    def decay(self, factor: float) -> None:
        """Earlier batches count less by this factor."""
        for tensor in self.tensors():
            tensor.mul_(factor)
        self.input_rows *= factor

    def add_mean(self, x: Tensor) -> None:
        """One call's input [b, k, c, h, w] (`ImageRows.split`) for sharing "reduce"."""
        rows, columns = self.geometry.positions(tuple(self.geometry.pad(x[:1, 0]).shape[2:]))
        self.input_shape = tuple(x.shape[2:] if self.geometry.convolution else x[0, 0, :, 0].T.shape)
        self.input_rows += x.shape[0] * x.shape[1] * rows * columns
        windows = mean_patches(x.flatten(0, 1), self.geometry).unflatten(0, x.shape[:2]).mean(1).permute(1, 2, 0)
        self.inputs += windows @ windows.transpose(1, 2)
        self.means += windows.sum(-1)

    def add_whole(self, gradient: Tensor) -> None:
        """One call's output gradient [b, k, o, h, w] for sharing "reduce", scaled as for `add_gradient`."""
        self.arrivals += 1
        add_rows(self.gradients, None, working(gradient).sum((1, 3, 4), dtype=torch.float64).unsqueeze(2), self.geometry.groups)

    def add_input(self, x: Tensor, images: int, generator: torch.Generator) -> None:
        """One call's input."""
        geometry = self.geometry
        if not geometry.convolution:
            self.input_shape = tuple(x.shape[1:])
            x = _by_image(x, images).transpose(1, 2).unsqueeze(2)  # [b, c, 1, T]
        else:
            x = x if x.ndim == 4 else x.unsqueeze(0)
            self.input_shape = tuple(x.shape[1:])
        height, width = x.shape[2] + sum(geometry.padding[2:]), x.shape[3] + sum(geometry.padding[:2])
        rows, columns = geometry.positions((height, width))
        total = rows * columns
        self.input_rows += x.shape[0] * total
        if self.by_patch and self.positions is not None and total > self.positions:
            chosen = self._choose(total, generator).to(x.device)
            windows = unfold_at(geometry.pad(working(x)), geometry, chosen // columns, chosen % columns)
            self._scaled(self.inputs, self.means, windows, total / self.positions)
        elif not self.by_patch:
            add_channels(self.inputs, x, geometry, pixels=self.patch == "pixel")
        elif geometry.offsets == 1:
            add_rows(self.inputs, self.means, geometry.pad(x)[:, :, :: geometry.stride[0], :: geometry.stride[1]], geometry.groups)
        else:
            add_patches(self.inputs, self.means, x, geometry)

    def add_gradient(self, gradient: Tensor, images: int, generator: torch.Generator) -> None:
        """One call's output gradient, already scaled so that the sum over backward passes is the Fisher average."""
        self.arrivals += 1
        gradient = working(gradient)
        if not self.geometry.convolution:
            gradient = _by_image(gradient, images).transpose(1, 2)
        else:
            gradient = gradient.reshape(-1, self.geometry.outputs, *gradient.shape[-2:]).flatten(2)
        total = gradient.shape[2]
        if self.positions is not None and total > self.positions:
            chosen = self._choose(total, generator).to(gradient.device)
            self._scaled(self.gradients, None, flat(gradient[:, :, chosen], self.geometry.groups), total / self.positions)
        else:
            add_rows(self.gradients, None, gradient, self.geometry.groups)

    def _choose(self, total: int, generator: torch.Generator) -> Tensor:
        """`positions` different positions out of `total`, each equally likely."""
        return torch.randperm(total, generator=generator, device=generator.device)[: self.positions]

    @staticmethod
    def _scaled(total: Tensor, means: Tensor | None, rows: Tensor, scale: float) -> None:
        if means is not None:
            means.add_(rows.sum(-1, dtype=torch.float64), alpha=scale)
        add_gram(total, rows * scale**0.5)

    def tensors(self) -> list[Tensor]:
        """Everything that is summed over processes."""
        return [self.inputs, self.means, self.gradients]

    def finish(self, images: float, count: int) -> LayerFactors:
        """Averages over `images` (decayed count); `count` is the true number of images."""
        geometry, reduce = self.geometry, self.sharing == "reduce"
        positions = self.input_rows / images
        A, mean = mirror(self.inputs), self.means
        if self.by_patch:
            A = natural_order(A, geometry, 2)
        if self.bias:
            mean = natural_order(mean, geometry, 1)
            corner = mean.new_full((*mean.shape[:-1], 1), images if reduce else self.input_rows)
            A = torch.cat([torch.cat([A, mean[..., None]], -1), torch.cat([mean, corner], -1)[..., None, :]], -2)
        A = A.div_(images)
        G = mirror(self.gradients).div_(images if reduce else self.input_rows)
        if geometry.groups == 1:
            A, G = A[0], G[0]
        return LayerFactors(self.name, A, G, count, positions, self.bias, geometry.groups, geometry.kernel, self.patch, self.input_shape)


def _by_image(x: Tensor, images: int) -> Tensor:
    """[..., features] as [images, T, features]; as one image where the rows do not divide by the images.

    Rows may come to lie with another image: sums over all rows, or over equally likely ones, do not ask whose they are.
    """
    rows = x.numel() // x.shape[-1]
    return x.reshape(images if rows % images == 0 else 1, -1, x.shape[-1])


def sum_over_processes(sums: dict[str, Sums], images: float, count: int) -> tuple[float, int]:
    """Adds every layer's sums over all processes in place; returns the images of all of them (decayed, true)."""
    if world() == 1:
        return images, count
    sum_(tensor for entry in sums.values() for tensor in entry.tensors())
    device = next(iter(sums.values())).inputs.device
    rows, arrivals = ([float(getattr(entry, kind)) for entry in sums.values()] for kind in ("input_rows", "arrivals"))
    numbers = torch.tensor([images, float(count), *rows, *arrivals], dtype=torch.float64, device=device)
    sum_([numbers])
    for entry, rows, arrivals in zip(sums.values(), *numbers[2:].unflatten(0, (2, -1)).tolist(), strict=True):
        entry.input_rows, entry.arrivals = rows, int(arrivals)
    return float(numbers[0]), int(numbers[1])
