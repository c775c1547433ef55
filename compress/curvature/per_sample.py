"""Weight gradients of single images, and what is averaged over them: EKFAC second moments and squared gradients.

Symbols: b images, per group g = o / groups outputs and d = c / groups kh kw (+ 1 for the bias) inputs;
grad_n = sum_t g_t a_t^T [g, d], over all positions and all calls of a layer, in the order (c, kh, kw).
    EKFAC  s = E_n[(Q_G^T grad_n Q_A)^2]   (George et al. 2018)
This is the diagonal of the exact Fisher block in the Kronecker-factored eigenbasis, hence its trace is exact and no diagonal in this basis
is nearer to the block.
All calls of a shared layer are taken to see the images in the same order; a network that flips the batch between two calls of one layer mixes
images up, which cannot be told from the values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from compress.curvature.capture import Tape, preserved
from compress.curvature.feed import Batches, find_layers, forward, no_gradient, unpack, with_last
from compress.curvature.fisher import check, cotangents
from compress.curvature.geometry import Geometry, geometry
from compress.curvature.images import ImageRows
from compress.curvature.layer_factors import LayerFactors
from compress.curvature.moments import images_per_chunk, natural_order, unfold, working
from compress.curvature.processes import broadcast_, own_generator, sum_
from compress.errors import RunError, UserError

Visitor = Callable[[str, Tensor, slice], None]


class _Calls:
    """Inputs of one layer in one forward pass, and the gradients that have come back for them."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, int]] = []
        self.gradients: dict[int, Tensor] = {}


@torch.inference_mode(False)  # a caller's inference mode would allow no gradients
def visit(model: nn.Module, batches: Batches, modules: dict[str, nn.Module], visitor: Visitor, *, fisher: str = "true", samples: int = 1,
          loss: str = "cross_entropy", generator: torch.Generator | None = None, bias: bool = True, training: bool = False) -> int:
    """Calls `visitor(layer name, gradients [b, groups, g, d], images)` for every layer, backward pass and chunk of images.

    The squares of the gradients add up to the Fisher matrix per image: samples are scaled by their number, classes by their
    probability. `images` is the slice of all images seen so far. Layers that no gradient reaches are not visited. Returns the number of
    images of this process.

    Raises
    ------
    UserError: options as for `collect`; a layer whose rows do not belong to single images. RunError: an input was overwritten in place.
    """
    check(fisher, loss, samples)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shapes = {name: geometry(module) for name, module in modules.items()}
    rows = ImageRows(model, modules)
    calls: dict[str, _Calls] = defaultdict(_Calls)
    count = 0
    images = 0

    def on_input(name: str, x: Tensor) -> None:
        calls[name].inputs.append((x.detach(), x._version))

    def on_output(name: str, _: Tensor) -> Callable[[Tensor], None]:
        index = len(calls[name].inputs) - 1

        def hook(gradient: Tensor) -> None:
            calls[name].gradients[index] = gradient
            if len(calls[name].gradients) == len(calls[name].inputs):
                flush(name)

        return hook

    def flush(name: str) -> None:
        entry = calls[name]
        gradients, entry.gradients = entry.gradients, {}
        pairs = []
        for index, gradient in gradients.items():
            x, version = entry.inputs[index]
            if x._version != version:
                raise RunError(
                    f"The input of layer {name!r} was overwritten in place before its gradient arrived; make that operation not in place."
                )
            pairs.append((rows.split(name, index, x), rows.split(name, index, gradient)))
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            for chunk, value in _gradients(pairs, shapes[name], images, bias):
                visitor(name, value, slice(count + chunk.start, count + chunk.stop))

    with preserved(model, training), torch.enable_grad():
        for batch in batches:
            arguments, labels, images = unpack(batch)
            if images == 0:
                continue
            rows.start(arguments, images)
            with Tape(modules, on_input, on_output) as tape:
                output = forward(model, arguments)
                for cotangent, last in with_last(cotangents(output, labels, fisher, loss, samples, generator)):
                    tape.backward(output, cotangent, retain=not last)
                    for name, entry in calls.items():
                        if entry.gradients:
                            flush(name)
                del output
            calls.clear()
            count += images
    return count


def _gradients(pairs: list[tuple[Tensor, Tensor]], shape: Geometry, images: int, bias: bool) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the batch, per-image gradients [b, groups, g, d]) over chunks of images; pairs [b, k, c, h, w] and [b, k, o, h', w']."""
    g, outputs, width = shape.groups, shape.outputs // shape.groups, shape.window
    with_bias = bias and shape.bias
    windows_per_image = max(gradient[0, :, 0].numel() for _, gradient in pairs)
    step = images_per_chunk(3 * 4 * max(outputs * (width + with_bias) * g, windows_per_image * width * g))
    for start in range(0, images, step):
        chunk = slice(start, min(start + step, images))
        total: Tensor | None = None
        for x, gradient in pairs:
            padded = shape.pad(working(x[chunk]).flatten(0, 1))
            back = working(gradient[chunk]).transpose(1, 2)
            back = back.reshape(len(back), g, outputs, -1)
            positions = shape.positions(tuple(padded.shape[2:]))
            windows = unfold(padded, shape, *positions).reshape(g, width, len(back), -1)
            value = natural_order(back @ windows.permute(2, 0, 3, 1), shape, 1)
            if with_bias:
                value = torch.cat([value, back.sum(-1, keepdim=True)], -1)
            total = value if total is None else total + value
        yield chunk, total


def _reduce(totals: dict[str, Tensor], reached: set[str], count: int) -> tuple[set[str], int]:
    """Sums over processes in place; the layers that a gradient reached in any of them, and the number of all their images."""
    numbers = torch.tensor([float(count), *(name in reached for name in totals)], dtype=torch.float64, device=next(iter(totals.values())).device)
    sum_([*totals.values(), numbers])
    count, *arrivals = numbers.tolist()
    return {name for name, number in zip(totals, arrivals, strict=True) if number}, int(count)


@torch.inference_mode(False)
def ekfac(
    model: nn.Module,
    batches: Batches,
    factors: dict[str, LayerFactors],
    *,
    fisher: str = "true",
    samples: int = 1,
    loss: str = "cross_entropy",
    generator: torch.Generator | None = None,
    training: bool = False,
) -> None:
    """Fills `second` of every LayerFactors from all batches; options as for `collect`.

    Raises
    ------
    UserError, RunError: as `visit`; no images, a layer that no gradient reached.
    """
    modules, generator = find_layers(model, factors), own_generator(generator)
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    totals: dict[str, Tensor] = {}
    reached: set[str] = set()
    for name, entry in factors.items():
        spectrum_a, spectrum_g = entry.eigen()
        broadcast_([*spectrum_a, *spectrum_g])  # machines may resolve equal eigenvalues differently, and the sums must share one basis
        offsets = (entry.kernel[0] * entry.kernel[1],) if entry.patch != "full" and entry.kernel != (1, 1) else ()
        q_a, q_g = (spectrum.vectors.reshape(entry.groups, *spectrum.vectors.shape[-2:]) for spectrum in (spectrum_a, spectrum_g))
        dtype = next(modules[name].parameters()).dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        bases[name] = q_a.to(dtype), q_g.to(dtype)
        totals[name] = torch.zeros(entry.groups, q_g.shape[-1], q_a.shape[-1], *offsets, dtype=torch.float64, device=q_a.device)

    def add(name: str, gradients: Tensor, _: slice) -> None:
        reached.add(name)
        q_a, q_g = bases[name]
        entry, total = factors[name], totals[name]
        if total.ndim == 4:
            gradients = gradients[..., : total.shape[2] * total.shape[3]].reshape(*gradients.shape[:3], total.shape[2], total.shape[3])
            rotated = torch.einsum("bgock,gcd->bgodk", torch.einsum("bgock,gop->bgpck", gradients, q_g), q_a)
        else:
            rotated = q_g.transpose(1, 2) @ gradients[..., : q_a.shape[-1]] @ q_a
        total += rotated.square().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise RunError(
                f"Layer {entry.name!r} saw NaN or infinity in its weight gradients; check the calibration images and the weights."
            )

    count = visit(model, batches, modules, add, fisher=fisher, samples=samples, loss=loss, generator=generator, training=training)
    reached, count = _reduce(totals, reached, count)
    if count == 0:
        raise UserError("No image was given for the EKFAC pass; batches must be readable twice (a list, not a generator).")
    for name, total in totals.items():
        if name not in reached:
            raise no_gradient(name)
        factors[name].second = (total / count)[0] if factors[name].groups == 1 else total / count


@torch.inference_mode(False)
def squared_gradients(model: nn.Module, batches: Batches, layers: Iterable[str] | None = None, *, fisher: str = "true", samples: int = 1,
                      loss: str = "cross_entropy", generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """F_ij = E_n[(dL_n / dw_ij)^2] of every layer's weight, flattened over groups to [o, d] without bias, float64.

    layers: names; None for all that a gradient reaches.

    Raises
    ------
    UserError: as `visit`; no images, a named layer that no gradient reached. RunError: as `visit`; NaN or infinity in a gradient.
    """
    modules, generator = find_layers(model, layers), own_generator(generator)
    reached: set[str] = set()
    totals = {}
    for name, module in modules.items():
        shape = geometry(module)
        totals[name] = torch.zeros(shape.outputs, shape.window, dtype=torch.float64, device=next(module.parameters()).device)

    def add(name: str, gradients: Tensor, _: slice) -> None:
        reached.add(name)
        totals[name] += gradients.square().sum(0, dtype=torch.float64).flatten(0, 1)

    count = visit(model, batches, modules, add, fisher=fisher, samples=samples, loss=loss, generator=generator, bias=False)
    reached, count = _reduce(totals, reached, count)
    if count == 0:
        raise UserError("No image was given to measure gradients on; give at least one batch of calibration images.")
    for name, total in totals.items():
        if name not in reached and layers is not None:
            raise no_gradient(name)
        if not torch.isfinite(total).all():
            raise RunError(f"Layer {name!r} saw NaN or infinity in its weight gradients; check the calibration images and the weights.")
    return {name: total / count for name, total in totals.items() if name in reached}
