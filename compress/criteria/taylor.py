"""The `Taylor` row of the EigenDamage table: s_c = E_n sum_t | z_{n,c,t} dL_n/dz_{n,c,t} |, divided by its sum over the layer's channels.

z is the output of the convolution or linear layer that produces the channel. Unlike `taylor_2016` the absolute value is taken before the
sum over positions, and the layer is divided by its L1 norm. A group's score is the sum over its layers: what each of them loses adds up.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.criteria import CRITERIA
from compress.criteria.base import Aggregate, Criterion, LayerOptions, Normalize, aggregate, normalize
from compress.criteria.second_order import layer_of, measured
from compress.curvature.capture import Tape, preserved
from compress.curvature.feed import find_layers
from compress.criteria.linearize import batch_loss, check_reached, samples
from compress.errors import UserError
from compress.undisturbed import differentiable


class TaylorOptions(LayerOptions):
    """Options of `taylor`."""

    normalize: Normalize = Field("sum", description="divide each layer's scores by this, before members are combined")
    aggregate: Aggregate = Field("sum", description="how the members of a group are combined")


@CRITERIA.register("taylor")
class Taylor(Criterion):
    """First-order importance of activations, absolute values summed over positions."""

    name = "taylor"
    needs_data = True
    Options = TaylorOptions

    @classmethod
    def members(cls, group, owners, options):
        return [member for member in group.members if member.role == "out" and measured(member, owners)]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        name = layer_of(model)
        modules = find_layers(model, dict.fromkeys(name(member) for _, members in picked for member in members))
        sums: dict[str, Tensor] = {}
        total = 0

        def on_output(layer: str, output: Tensor):
            # a copy, because an activation in place may follow
            value = output.detach().clone()
            axis = 1 if hasattr(modules[layer], "kernel_size") else -1

            def hook(gradient: Tensor) -> None:
                product = (gradient * value).abs().movedim(axis, 0).flatten(1).sum(1, dtype=torch.float64) * count
                sums[layer] = sums[layer] + product if layer in sums else product

            return hook

        with preserved(model), torch.inference_mode(False), torch.enable_grad():
            for inputs, targets in map(differentiable, batches):
                count = samples(inputs)
                with Tape(modules, None, on_output) as tape:
                    loss = batch_loss(model, inputs, targets, loss_fn)
                    tape.backward(loss, torch.ones_like(loss), retain=False)
                total += count
        if total == 0:
            raise UserError("Criterion 'taylor' needs calibration images, and got no batch.")
        check_reached(layer for layer in modules if layer not in sums)
        for _, members in picked:
            values = [normalize(sums[name(m)][m.indices.to(sums[name(m)].device)].sum(1) / total, options.normalize) for m in members]
            yield aggregate(values, options.aggregate)
