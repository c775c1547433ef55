"""Layers of a compressed network fitted, one after another, to what the same layers of the original give on calibration data.

For each layer in the order of execution, with x' the windows that it reads in the compressed network (all layers before it fitted already), y
the outputs of the original's layer that are still there, and [W, b] its weights, or those of the last factor of a block:
    minimise  sum_n || y_n - [W, b] [x'_n, 1] ||^2 + lambda || [W, b] - [W0, b0] ||^2,      lambda = damping times the mean of the diagonal
of sum x' x'^T, W0 the weights as compression left them. The errors of the layers before enter x', so that each layer corrects them too
(asymmetric reconstruction, Zhang et al. 2016; of pruned channels He et al. 2017). Closed form, no training, shapes unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.curvature.geometry import BLOCKS, Geometry, geometry
from compress.curvature.linalg import inverse
from compress.curvature.moments import add_gram, images_per_chunk, mirror, working
from compress.decompose.targets import excluded, observe
from compress.errors import RunError, UserError
from compress.plan import Plan
from compress.surgery import Step
from compress.undisturbed import arguments, undisturbed

DAMPING = 1e-4
UNTOUCHED = 10  # roundings of the data's type: a relative squared error below this is that of a layer which gives what it did in the original


class Fit(NamedTuple):
    """Relative squared error of a layer's outputs before and after it was fitted."""

    before: float
    after: float


class _Stop(BaseException):
    """Ends a forward pass at the layer that was asked for; no `except Exception` of the network's own code holds it up."""


def reconstruct(model: nn.Module, original: nn.Module, plan: Plan | Sequence[Step], batches: Iterable[tuple[Any, Any]], example: Any = None,
                damping: float = DAMPING, exclude: Sequence[str] = ()) -> dict[str, Fit]:
    """Fit `model`, compressed from `original` by `plan`, to the original's layers on `batches`, in place.

    Parameters
    ----------
    plan: all steps from the original to `model`: they say which outputs are left.
    batches: pairs (inputs, targets) of calibration data; targets are not used.
    example: example inputs; the first image of the first batch if None.
    damping: pull towards the weights as they are, in units of the mean second moment of the inputs.
    exclude: name patterns of layers, of modules around them, or of parameters, that stay as they are.

    Fitted are exactly Linear and Conv2d (no subclasses), in groups or not, and the last factor of blocks; not those that are called more or
    less than once, share or parametrize parameters, are frozen, or do not exist in the original under the same name. A weight that the network
    also reads outside its layer's call belongs into `exclude`. BatchNorm statistics stay as they are. Both networks are run and broken off.

    Returns the errors by layer; layers that need no fit are left out.

    Raises
    ------
    UserError: no images, a plan that zeroes weights (they would not stay zero) or belongs to another network, damping that is not above 0.
    RunError: activations that are not finite.
    """
    steps = list(plan.steps if isinstance(plan, Plan) else plan)
    if any(step["kind"] not in ("prune", "factorize") for step in steps):
        raise UserError("A network with masks cannot be reconstructed: its zeros would not stay.")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise UserError(f"The damping of a reconstruction is a number above 0, got {damping!r}.")
    inputs = [arguments(batch[0]) for batch in batches if len(arguments(batch[0])[0])]
    if not inputs:
        raise UserError("Reconstruction needs calibration images to compare outputs on, and got none.")
    example = tuple(part[:1] for part in inputs[0]) if example is None else example
    fits = {}
    with torch.no_grad(), undisturbed(model), undisturbed(original):
        for name in _fitted(model, original, example, exclude):
            fit = _fit(model, original, name, _kept(original.get_submodule(name), name, steps), inputs, damping)
            if fit is not None:
                fits[name] = fit
    return fits


def _fitted(model: nn.Module, original: nn.Module, example: Any, exclude: Sequence[str]) -> list[str]:
    """The layers to fit in the order of their calls."""
    calls, before = observe(model, example), observe(original, example)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    inside = {f"{name}.{part}" for network in (model, original) for name, module in network.named_modules() if isinstance(module, BLOCKS)
              for part, _ in module.named_children()}
    chosen = []
    for name, called in calls.items():
        module = model.get_submodule(name)
        if name in inside or len(called.shapes) != 1 or name not in before or len(before[name].shapes) != 1 or excluded(name, module, exclude):
            continue
        last = _last(module)
        parameters = list(last.parameters(recurse=False))
        # exactly these types: a subclass may compute anything with its weight
        kind = type(original.get_submodule(name)) in (nn.Conv2d, nn.Linear, *BLOCKS) and type(last) in (nn.Conv2d, nn.Linear)
        plain = "weight" in last._parameters and (last.bias is None or "bias" in last._parameters)
        if kind and plain and all(owners[id(parameter)] == 1 and parameter.requires_grad for parameter in parameters):
            chosen.append(name)
    return chosen


def _last(module: nn.Module) -> nn.Module:
    """The layer itself, or the last factor of a block."""
    return list(module.children())[-1] if isinstance(module, BLOCKS) else module


def _kept(layer: nn.Module, name: str, steps: Sequence[Step]) -> Tensor:
    """Which outputs of the original's layer are left, in order."""
    kept = torch.arange(geometry(layer).outputs)
    weights = {f"{name}.weight", *(f"{name}.{part}.weight" for part in list(dict(layer.named_children()))[-1:])}
    for step in steps:
        for weight in weights & step.get("slices", {}).keys():
            stays = torch.ones(len(kept), dtype=torch.bool)
            stays[torch.as_tensor(step["slices"][weight].get("0", []), dtype=torch.long)] = False
            kept = kept[stays]
    return kept


def _fit(model: nn.Module, original: nn.Module, name: str, kept: Tensor, inputs: list[tuple], damping: float) -> Fit | None:
    layer = _last(model.get_submodule(name))
    shape = geometry(layer)
    if len(kept) != shape.outputs:
        raise UserError(f"Layer {name!r} has {shape.outputs} outputs, and the plan leaves {len(kept)}; give all steps from the original to this network.")
    seen: dict[str, Tensor] = {}

    def read(_: nn.Module, given: tuple, keywords: dict[str, Any]) -> None:
        seen["x"] = given[0] if given else next(iter(keywords.values()))
        raise _Stop

    def give(_: nn.Module, __: tuple, output: Tensor) -> None:
        seen["y"] = output
        raise _Stop

    sums: Sums | None = None
    # inside the user's own hooks: what the layer itself reads and gives
    hooks = [layer.register_forward_pre_hook(read, with_kwargs=True), original.get_submodule(name).register_forward_hook(give, prepend=True)]
    try:
        for parts in inputs:
            seen.clear()
            for network in (original, model):
                try:
                    network(*parts)
                except _Stop:
                    continue
            if seen.keys() != {"x", "y"}:  # some networks read their layers' weights themselves in evaluation mode
                return None
            wanted = seen["y"].movedim(-3, -1) if shape.convolution else seen["y"]
            sums = Sums(shape, len(kept), wanted.device) if sums is None else sums
            sums.add(seen["x"], wanted.index_select(-1, kept.to(wanted.device)))
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.isfinite(sums.gram).all() or not torch.isfinite(sums.cross).all():
        raise RunError(f"Layer {name!r} reads or gives NaN or infinity on the calibration data; check the images, then the compressed network.")
    weights = [layer.weight.double().reshape(shape.groups, -1, shape.window)]
    if shape.bias:
        weights.append(layer.bias.double().reshape(shape.groups, -1, 1))
    old = torch.cat(weights, 2)
    before = sums.error(old)
    if before < UNTOUCHED * torch.finfo(working(seen["y"]).dtype).eps:
        return None
    shift = damping * sums.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    new = torch.stack([(cross + pull * start) @ inverse(gram, damping, f"input moment of layer {name!r}")
                       for cross, pull, start, gram in zip(sums.cross, shift, old, sums.gram, strict=True)])
    after = sums.error(new)
    if not after < before:
        return Fit(before, before)
    layer.weight.copy_(new[..., :shape.window].reshape(layer.weight.shape))
    if shape.bias:
        layer.bias.copy_(new[..., shape.window].flatten())
    return Fit(before, after)


class Sums:
    """Second moments of windows a [g, d], with a last 1 where the layer has a bias, and their products with the wanted outputs y [o].

    gram [g, d, d], cross [g, o / g, d], energy sum y^2; float64, products in the data's type.
    """

    def __init__(self, shape: Geometry, outputs: int, device: torch.device) -> None:
        self.shape, d = shape, shape.window + shape.bias
        zeros = lambda *size: torch.zeros(*size, dtype=torch.float64, device=device)  # noqa: E731
        self.gram, self.cross, self.energy = zeros(shape.groups, d, d), zeros(shape.groups, outputs // shape.groups, d), zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """x as the layer reads it, y [..., o] with one row per window."""
        shape, x, y = self.shape, working(x), working(y)
        if shape.convolution and x.ndim == 3:  # one image without a batch
            x, y = x[None], y[None]
        if not shape.convolution:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        per_image = y[0].numel() // y.shape[-1] * shape.window * shape.groups * x.element_size() if shape.convolution else x[0].numel() * x.element_size()
        pieces = images_per_chunk(per_image)
        gram = torch.zeros_like(self.gram)
        for given, wanted in zip(x.split(pieces), y.split(pieces), strict=True):
            windows = self._windows(given)  # [g, d, n]
            targets = wanted.reshape(-1, wanted.shape[-1]).T.reshape(shape.groups, -1, windows.shape[-1])
            add_gram(gram, windows)
            self.cross += targets @ windows.transpose(1, 2)
            self.energy += targets.square().sum(dtype=torch.float64)
        self.gram += mirror(gram)

    def _windows(self, x: Tensor) -> Tensor:
        shape = self.shape
        if shape.convolution:
            patches = functional.unfold(shape.pad(x), shape.kernel, shape.dilation, 0, shape.stride)
            x = patches.transpose(0, 1).reshape(shape.groups, shape.window, -1)
        else:
            x = x.T[None]
        return torch.cat([x, x.new_ones(shape.groups, 1, x.shape[2])], 1) if shape.bias else x

    def error(self, weights: Tensor) -> float:
        """sum ||y - w a||^2 / sum ||y||^2 for weights [g, o / g, d]; zero where both are."""
        missed = self.energy - 2 * (weights * self.cross).sum() + ((weights @ self.gram) * weights).sum()
        return (missed.clamp_min(0) / self.energy).item() if self.energy > 0 else float(missed > 0)
