"""Hessian trace (HAP, Yu et al. 2022): s_i = tr(H_ii) / n_i * ||w_i||^2, H_ii the Hessian of the mean loss over the n_i weights of slice i.

Traces by Hutchinson: E_v[v^T H v] with v of random signs over all measured weights at once; the terms of one slice add up to its trace.
Losses of the slices of a group add up. A trace may be negative away from a minimum: such channels go first.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, Options, slices, tensors
from compress.criteria.linearize import batch_loss, check_reached, gradients_of, samples
from compress.criteria.second_order import SecondOrder
from compress.errors import UserError
from compress.undisturbed import differentiable, undisturbed


class HessianTraceOptions(Options):
    """Options of `hessian_trace`."""

    probes: int = Field(4, ge=1, description="random sign vectors per batch")
    side: Literal["producer", "consumer", "both"] = Field(
        "producer", description="score what the channel costs where it is made, where it is read, or both"
    )


@CRITERIA.register("hessian_trace")
class HessianTrace(Criterion):
    """Mean curvature of a channel's weights times their squared norm."""

    name = "hessian_trace"
    needs_data = True
    Options = HessianTraceOptions
    members = SecondOrder.members

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        named = tensors(model)
        weights = {member.parameter: named[member.parameter] for _, members in picked for member in members}
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        diagonal = {name: torch.zeros(weight.shape, dtype=torch.float64, device=weight.device) for name, weight in weights.items()}
        total = 0
        reached: set[str] = set()
        # the fused kernels of attention have no second derivative
        with undisturbed(model), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for inputs, targets in map(differentiable, batches):
                gradients = gradients_of(batch_loss(model, inputs, targets, loss_fn), list(weights.values()), create_graph=True)
                count = samples(inputs)
                total += count
                reached |= {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
                # a gradient that depends on no weight has no second derivative
                curved = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
                for probe in range(options.probes):
                    signs = [
                        (torch.randint(0, 2, weight.shape, generator=generator, device=generator.device) * 2 - 1).to(weight)
                        for weight in weights.values()
                    ]
                    products = torch.autograd.grad(
                        [gradients[i] for i in curved], list(weights.values()), [signs[i] for i in curved],
                        retain_graph=probe + 1 < options.probes, allow_unused=True,
                    ) if curved else ()
                    for name, sign, product in zip(weights, signs, products):
                        if product is not None:
                            diagonal[name] += (sign * product).double() * (count / options.probes)
        if total == 0:
            raise UserError("Criterion 'hessian_trace' needs calibration images, and got no batch.")
        check_reached(name.rpartition(".")[0] for name in weights if name not in reached)
        for _, members in picked:
            yield sum(_score(diagonal[m.parameter] / total, weights[m.parameter], m) for m in members)


def _score(diagonal, weight, member):
    return (slices(diagonal, member.dim, member.indices).mean(1) * slices(weight, member.dim, member.indices).square().sum(1)).cpu()
