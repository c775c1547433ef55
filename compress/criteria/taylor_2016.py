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
from compress.criteria.base import NORMS, Criterion, LayerOptions, Normalize, aggregate, normalize
from compress.criteria.linearize import batch_loss, check_reached, gradients_of, samples
from compress.criteria.second_order import layer_of
from compress.errors import UserError
from compress.undisturbed import differentiable, undisturbed

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    ran: bool = False


@CRITERIA.register("taylor_2016")
class Taylor2016(Criterion):
    """Mean absolute first-order change of a sample's loss, from activations."""

    name = "taylor_2016"
    needs_data = True
    Options = Taylor2016Options

    lacks = "no normalisation, convolution or linear module carries its channels in its output"

    @classmethod
    def members(cls, group, owners, options):
        norms = [m for m in group.members if isinstance(module := owners.get(m.parameter), NORMS)
                 and m.parameter.rpartition(".")[2] == "weight" and module.weight.dim() == 1]
        if norms and options.site == "norm":
            return norms
        return [m for m in group.members if m.role == "out" and _carries(owners.get(m.parameter), m.dim)]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        modules = dict(model.named_modules(remove_duplicate=False))
        name = layer_of(model)
        measured = [[(member, modules[name(member)]) for member in members] for _, members in picked]
        sites = {id(module): Site(module) for pairs in measured for _, module in pairs}
        sums: dict[tuple[int, int], Tensor] = {}
        total = 0
        with undisturbed(model), torch.inference_mode(False), torch.enable_grad(), _gated(sites):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for inputs, targets in map(differentiable, batches):
                count = samples(inputs)
                total += count
                gradients = _gradients(model, sites, inputs, targets, loss_fn)
                for g, pairs in enumerate(measured):
                    for i, (member, module) in enumerate(pairs):
                        if (gradient := gradients.get(id(module))) is not None:
                            value = count * gradient[:, member.indices.to(gradient.device)].mean(2)
                            sums[g, i] = sums.get((g, i), 0) + value.abs().sum(0).cpu()
        if total == 0:
            raise UserError("Criterion 'taylor_2016' needs calibration images, and got no batch.")
        for g, (_, members) in enumerate(picked):
            # beside others, a layer whose module never runs (attention reads the weights of its projections) is left out
            ran = [i for i, (_, module) in enumerate(measured[g]) if sites[id(module)].ran] or range(len(members))
            check_reached(members[i].parameter.rpartition(".")[0] for i in ran if (g, i) not in sums)
            yield aggregate([normalize(sums[g, i] / total, options.normalize) for i in ran], options.aggregate)


def _carries(module: nn.Module | None, dim: int) -> bool:
    """Whether index i of the weight's dimension `dim` is channel i of the module's output."""
    if isinstance(module, _TRANSPOSED):
        return dim == 1 and module.groups == 1
    return dim == 0 and isinstance(module, (*_CONVS, nn.Linear))


def _gradients(model: nn.Module, sites: dict[int, Site], inputs: Any, targets: Any, loss_fn: Any) -> dict[int, Tensor]:
    """Mean over positions of z dL/dz, float64 [samples, channels] per site that a gradient reached."""
    for site in sites.values():
        site.samples, site.gate, site.positions = samples(inputs), None, 0
    loss = batch_loss(model, inputs, targets, loss_fn)
    ran = {key: site for key, site in sites.items() if site.gate is not None}
    gradients = gradients_of(loss, [site.gate for site in ran.values()])
    return {key: gradient.to(torch.float64) / site.positions
            for (key, site), gradient in zip(ran.items(), gradients, strict=True) if gradient is not None}


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
    def gate(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if len(output) % site.samples:
            raise UserError(f"Criterion 'taylor_2016' cannot tell the samples apart in a {type(module).__name__}: its output has "
                            f"{len(output)} rows for a batch of {site.samples}.")
        axis = _axis(module, output)
        if site.gate is None:
            site.ran = True
            site.gate = output.new_ones(site.samples, output.shape[axis]).requires_grad_(True)
        site.positions += output.numel() // site.gate.numel()
        shape = [1] * output.dim()
        shape[0], shape[axis] = len(output), output.shape[axis]
        # Windows folded into the batch dimension (Swin) stay beside each other, so each sample's rows share its gate.
        return output * site.gate.repeat_interleave(len(output) // site.samples, 0).reshape(shape)

    return gate


def _axis(module: nn.Module, output: Tensor) -> int:
    """The dimension of a module's output that holds its channels."""
    channels = module.weight.shape[1 if isinstance(module, _TRANSPOSED) else 0]
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        candidates = (-1,)
    else:
        # Subclasses of LayerNorm may normalise images [n, c, h, w] over c.
        candidates = (1, -1) if isinstance(module, nn.LayerNorm) else (1,)
    for axis in candidates:
        if output.dim() > 1 and output.shape[axis] == channels:
            return axis
    raise UserError(f"Criterion 'taylor_2016' cannot find the {channels} channels of a {type(module).__name__} in its output of "
                    f"shape {tuple(output.shape)}.")
