"""Collects the second moments of the layers of a network in one pass over calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress.curvature.accumulate import PATCHES, SHARINGS, Sums, sum_over_processes
from compress.curvature.capture import Tape, preserved
from compress.curvature.fisher import check, cotangents
from compress.curvature.feed import Batches, find_layers, forward, no_gradient, unpack, with_last
from compress.curvature.geometry import geometry
from compress.curvature.images import ImageRows
from compress.curvature.layer_factors import LayerFactors
from compress.curvature.per_sample import ekfac as measure_second
from compress.curvature.processes import own_generator
from compress.errors import RunError, UserError


@torch.inference_mode(False)  # a caller's inference mode would allow no gradients
def collect(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Iterable[str] | None = None,
    fisher: str = "true",
    samples: int = 1,
    patch: str = "full",
    sharing: str = "expand",
    bias: bool = True,
    positions: int | None = None,
    loss: str = "cross_entropy",
    generator: torch.Generator | None = None,
    ekfac: bool = False,
    decay: float | None = None,
    training: bool = False,
) -> dict[str, LayerFactors]:
    """K-FAC factors of every Linear and Conv2d that the network calls, as plain averages over the images.

    The network runs in evaluation mode; flags, buffers, hooks and `.grad` are as before afterwards, also when it raises. Under
    `torch.distributed` each process gives its own share of the images and all of them get the result of all images; `local()` is for
    one process that measures alone.

    Parameters
    ----------
    batches: (inputs, labels) pairs or inputs alone; a last smaller batch counts by its images. With `ekfac` they are read twice.
    layers: names; None for all. Named factorized blocks count as one layer with the block's outer input and output.
    fisher: "true" (labels drawn from the network's own probabilities, `samples` per image from one forward pass), "exact" (every
        class weighted by its probability, one backward pass per output number), or "empirical" (the given labels).
    patch: "full" (second moment of the whole window), "channel" (of its channels, averaged over the kernel offsets), or "pixel" (of the
        channels, every input pixel once). Windows of 1x1 and linear layers are the same for "full" and "channel".
    sharing: "expand" (positions independent), or "reduce" (window averaged and gradient summed over an image's positions first; where a
        layer's images are is measured, see `images`).
    bias: give A a row for the bias where the layer has one and A is over whole windows.
    positions: use only so many random positions per image and layer, rescaled: unbiased, cheaper. None: all.
    loss: "cross_entropy" on logits, or "mse" (half the squared distance), summed per image.
    generator: draws labels and positions; seed 0 if None. Several processes draw different ones from equal seeds.
    ekfac: measure `second` in the eigenbasis from all batches in a second pass (see `per_sample.ekfac`).
    decay: moving average instead of the plain one: every batch weighs 1 / decay times the one before it (normalised weights).
    training: run in training mode (as published for Improved EigenDamage); buffers are still restored.

    Returns
    -------
    Layer name -> LayerFactors, in the order of `named_modules`; layers that no batch reached are left out unless they were named.

    Raises
    ------
    UserError: wrong options, no images, a named layer that no image reached, a layer that images reached and no gradient. RunError: NaN or infinity reached a layer.
    """
    check(fisher, loss, samples)
    _check_options(patch, sharing, positions, decay)
    generator = own_generator(generator)
    modules = find_layers(model, layers)
    if ekfac and iter(batches) is batches:
        batches = list(batches)
    sums: dict[str, Sums] = {}
    order: list[str] = []
    rows = ImageRows(model, modules) if sharing == "reduce" else None
    current = {"images": 0}
    calls: Counter[str] = Counter()

    def on_input(name: str, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            if name not in order:
                order.append(name)
            if rows is None:
                sums[name].add_input(x.detach(), current["images"], generator)
            else:
                sums[name].add_mean(rows.split(name, calls[name], x.detach()))
        calls[name] += 1

    def on_output(name: str, _: Tensor) -> Any:
        call = calls[name] - 1

        def hook(gradient: Tensor) -> None:
            with torch.autocast(gradient.device.type, enabled=False):
                if rows is None:
                    sums[name].add_gradient(gradient, current["images"], generator)
                else:
                    sums[name].add_whole(rows.split(name, call, gradient))

        return hook

    images, count = 0.0, 0
    with preserved(model, training), torch.enable_grad():
        for name, module in modules.items():
            sums[name] = Sums(name, geometry(module), patch, sharing, bias, positions, next(module.parameters()).device)
        for batch in batches:
            arguments, labels, current["images"] = unpack(batch)
            if current["images"] == 0:
                continue
            if decay is not None and count:
                images *= decay
                for entry in sums.values():
                    entry.decay(decay)
            if rows is not None:
                rows.start(arguments, current["images"])
            calls.clear()
            with Tape(modules, on_input, on_output) as tape:
                output = forward(model, arguments)
                for cotangent, last in with_last(cotangents(output, labels, fisher, loss, samples, generator)):
                    tape.backward(output, cotangent, retain=not last)
                del output
            images, count = images + current["images"], count + current["images"]
    images, count = sum_over_processes(sums, images, count)
    if count == 0:
        raise UserError("No image was given to collect statistics from; give at least one batch of calibration images.")
    factors = _finish(sums, order, images, count, named=layers is not None)
    if ekfac:
        measure_second(model, batches, factors, fisher=fisher, samples=samples, loss=loss, generator=generator, training=training)
    return factors


def _check_options(patch: str, sharing: str, positions: int | None, decay: float | None) -> None:
    if patch not in PATCHES:
        raise UserError(f"Unknown patch kind {patch!r}; known: {', '.join(PATCHES)}.")
    if sharing not in SHARINGS:
        raise UserError(f"Unknown sharing {sharing!r}; known: {', '.join(SHARINGS)}.")
    if sharing == "reduce" and patch != "full":
        raise UserError(f"The sharing 'reduce' averages whole windows; use patch 'full', not {patch!r}.")
    if positions is not None and (not isinstance(positions, int) or positions < 1):
        raise UserError(f"The number of sampled positions must be an integer from 1, or null for all, got {positions!r}.")
    if decay is not None and not 0 < decay <= 1:
        raise UserError(f"The decay of the moving average must be in (0, 1], got {decay!r}.")


def _finish(sums: dict[str, Sums], order: list[str], images: float, count: int, named: bool) -> dict[str, LayerFactors]:
    """Averages; the sums are freed layer by layer."""
    for name in sorted(sums, key=lambda name: order.index(name) if name in order else len(order)):
        # a sum of squares on the diagonal is finite only if every number in its row was
        bad = [what for what, moment in (("inputs", sums[name].inputs), ("output gradients", sums[name].gradients))
               if not torch.isfinite(moment.diagonal(dim1=-2, dim2=-1)).all()]
        if bad:
            raise RunError(
                f"Layer {name!r} saw NaN or infinity in its {bad[0]} on the calibration data; check the images and the network's weights."
            )
    factors = {}
    for name in list(sums):
        entry = sums.pop(name)
        if entry.input_rows:
            if not entry.arrivals:
                raise no_gradient(name)
            factors[name] = entry.finish(images, count)
        elif named:
            raise UserError(f"Layer {name!r} was named for statistics, but no calibration image reached it as a module; exclude it.")
    return factors
