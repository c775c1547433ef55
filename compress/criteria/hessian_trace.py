"""Hessian trace (HAP, Yu et al. 2022): s_i = tr(H_ii) / n_i * ||w_i||^2, H_ii the Hessian of the mean loss over the n_i weights of slice i.

Traces by Hutchinson: E_v[v^T H v] with v of random signs over all measured weights at once; the terms of one slice add up to its trace.
Losses of the slices of a group add up. A trace may be negative away from a minimum: such channels go first.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, Options, slices, tensors
from compress.criteria.linearize import check_scalar, samples
from compress.criteria.second_order import SecondOrder
from compress.errors import UserError
from compress.undisturbed import arguments, differentiable, undisturbed


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
        with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for inputs, targets in map(differentiable, batches):
                loss = loss_fn(model(*arguments(inputs)), targets)
                check_scalar(loss)
                count = samples(inputs)
                total += count
                gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                for probe in range(options.probes):
                    signs = [
                        (torch.randint(0, 2, weight.shape, generator=generator, device=generator.device) * 2 - 1).to(weight)
                        for weight in weights.values()
                    ]
                    products = torch.autograd.grad(
                        gradients, list(weights.values()), signs, retain_graph=probe + 1 < options.probes, allow_unused=True
                    )
                    for name, sign, product in zip(weights, signs, products, strict=True):
                        if product is not None:
                            diagonal[name] += (sign * product).double() * (count / options.probes)
        if total == 0:
            raise UserError("Criterion 'hessian_trace' needs calibration images, and got no batch.")
        for _, members in picked:
            yield sum(_score(diagonal[m.parameter] / total, weights[m.parameter], m) for m in members)


def _score(diagonal, weight, member):
    return (slices(diagonal, member.dim, member.indices).mean(1) * slices(weight, member.dim, member.indices).square().sum(1)).cpu()
