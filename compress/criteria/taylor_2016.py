"""Taylor importance of activations (Molchanov et al. 2016, "Pruning Convolutional Neural Networks for Resource Efficient Inference").

    s_c = E_n | (1 / T) * sum over t of  z_{n,c,t} * dL_n/dz_{n,c,t} |

z: the channel's activation for sample n at position t of T; the absolute value is taken after the mean over positions. L_n is the
loss of one sample: its gradient is B dL/dz, with L the mean loss of a batch of B samples. Each layer is divided by the L2 norm over
its channels (option `normalize`), then the layers of a group are averaged.

Where z is measured (option `site`): "norm" behind the group's normalisation layers where it has some (surgery removes what is read
there, and zeroing a convolution in front of BatchNorm is something else), else behind the convolution or linear layers that
produce it; "producer": always behind the latter. ReLU does not change z * dL/dz.

Each site's output is multiplied by a gate of ones [samples, channels]: its gradient is the sum over positions, also where the
output is changed in place afterwards or the layer runs several times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, LayerOptions, Normalize, aggregate, normalize, prunable
from compress.criteria.linearize import check_scalar, samples
from compress.errors import UserError
from compress.undisturbed import arguments, differentiable, undisturbed

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAST = (nn.Linear, nn.LayerNorm)


class Taylor2016Options(LayerOptions):
    """Options of `taylor_2016`."""

    normalize: Normalize = Field("l2", description="divide each layer's scores by this, before members are combined")
    site: Literal["norm", "producer"] = Field(
        "norm", description="where activations are measured: behind normalisation, or behind the weights")


@dataclass
class Site:
    """One layer whose output carries channels of groups, and its gate in the present batch of `samples`."""

    module: nn.Module
    samples: int = 0
    gate: Tensor | None = None
    positions: int = 0


@CRITERIA.register("taylor_2016")
class Taylor2016(Criterion):
    """Mean absolute first-order change of a sample's loss, from activations."""

    name = "taylor_2016"
    needs_data = True
    Options = Taylor2016Options

    @classmethod
    def lacks(cls) -> str:
        return "no normalisation, convolution or linear module whose output carries its channels ran in the forward pass"

    @classmethod
    def measure(cls, graph, model, batches, loss_fn, generator, options):
        modules = {f"{name}.weight" if name else "weight": module for name, module in model.named_modules(remove_duplicate=False)}
        groups = prunable(graph)
        chosen = {group.name: _sites(group, modules, options.site) for group in groups}
        sites = {id(module): Site(module) for members in chosen.values() for _, module in members}
        sums: dict[tuple[str, int], Tensor] = {}
        total = 0
        with undisturbed(model), torch.inference_mode(False), torch.enable_grad(), _gated(sites):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for inputs, targets in map(differentiable, batches):
                count = samples(inputs)
                total += count
                for key, gradient in _gradients(model, sites, arguments(inputs), targets, loss_fn).items():
                    for group in groups:
                        for i, (member, module) in enumerate(chosen[group.name]):
                            if id(module) == key:
                                value = count * gradient[:, member.indices.to(gradient.device)].mean(2)
                                sums[group.name, i] = sums.get((group.name, i), 0) + value.abs().sum(0).cpu()
        if total == 0:
            raise UserError("Criterion 'taylor_2016' needs calibration images, and got no batch.")
        for group in groups:
            values = [normalize(sums[group.name, i] / total, options.normalize)
                      for i in range(len(chosen[group.name])) if (group.name, i) in sums]
            yield group, aggregate(values, options.aggregate)


def _sites(group: Any, modules: dict[str, nn.Module], site: str) -> list[tuple[Any, nn.Module]]:
    norms = [(m, modules[m.parameter]) for m in group.members
             if m.role == "param" and isinstance(modules.get(m.parameter), _NORMS)]
    if norms and site == "norm":
        return norms
    return [(m, modules[m.parameter]) for m in group.members
            if m.role == "out" and _carries(modules.get(m.parameter), m.dim)]


def _carries(module: nn.Module | None, dim: int) -> bool:
    """Whether index i of the weight's dimension `dim` is channel i of the module's output."""
    if isinstance(module, _TRANSPOSED):
        return dim == 1 and module.groups == 1
    return dim == 0 and isinstance(module, (*_CONVS, nn.Linear))


def _gradients(model: nn.Module, sites: dict[int, Site], inputs: tuple, targets: Any, loss_fn: Any) -> dict[int, Tensor]:
    """Mean over positions of z dL/dz, float64 [samples, channels] per site that ran."""
    for site in sites.values():
        site.samples, site.gate, site.positions = samples(inputs), None, 0
    loss = loss_fn(model(*inputs), targets)
    ran = {key: site for key, site in sites.items() if site.gate is not None}
    if not ran:
        return {}
    check_scalar(loss)
    gradients = torch.autograd.grad(loss, [site.gate for site in ran.values()], allow_unused=True)
    return {key: (torch.zeros_like(site.gate) if gradient is None else gradient).to(torch.float64) / site.positions
            for (key, site), gradient in zip(ran.items(), gradients)}


@contextlib.contextmanager
def _gated(sites: dict[int, Site]) -> Iterator[None]:
    """Forward hooks that multiply each site's output by its gate."""
    handles = [site.module.register_forward_hook(_hook(site)) for site in sites.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(site: Site) -> Any:
    axis = -1 if isinstance(site.module, _LAST) else 1

    def gate(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if len(output) % site.samples:
            raise UserError(f"Criterion 'taylor_2016' cannot tell the samples apart in a {type(module).__name__}: its output has "
                            f"{len(output)} rows for a batch of {site.samples}.")
        if site.gate is None:
            site.gate = output.new_ones(site.samples, output.shape[axis]).requires_grad_(True)
        site.positions += output.numel() // site.gate.numel()
        shape = [1] * output.dim()
        shape[0], shape[axis] = len(output), output.shape[axis]
        # Windows folded into the batch dimension (Swin) stay beside each other, so each sample's rows share its gate.
        return output * site.gate.repeat_interleave(len(output) // site.samples, 0).reshape(shape)

    return gate
