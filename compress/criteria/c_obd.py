"""C-OBD (Wang et al. 2019): s_i = 1/2 sum_j w_ij^2 F_ij, F_ij = E_n[(dL_n / dw_ij)^2] from gradients of single images; no compensation.

Labels are drawn from the network (`fisher="true"`). Positions and calls of a layer are summed before the square.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, Normalize, Options, normalize, slices
from compress.criteria.second_order import SecondOrder, layer_of
from compress.curvature import squared_gradients


class CObdOptions(Options):
    """Options of `c_obd`."""

    fisher: Literal["true", "exact", "empirical"] = Field(
        "true", description="labels drawn from the network, all classes weighted, or the data's labels"
    )
    samples: int = Field(1, ge=1, description="labels drawn per image where fisher is true")
    side: Literal["producer", "consumer", "both"] = Field(
        "producer", description="score what the channel costs where it is made, where it is read, or both"
    )
    normalize: Normalize = Field("none", description="divide each group's scores by this; none: as published, losses compare over groups")


@CRITERIA.register("c_obd")
class CObd(Criterion):
    """Diagonal Fisher loss of a channel's weights."""

    name = "c_obd"
    needs_data = True
    Options = CObdOptions
    members = SecondOrder.members

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        name = layer_of(model)
        wanted = dict.fromkeys(name(member) for _, members in picked for member in members)
        fisher = squared_gradients(model, batches, wanted, fisher=options.fisher, samples=options.samples, generator=generator)
        losses = {}
        for layer in wanted:
            weight = model.get_submodule(layer).weight.detach()
            losses[layer] = fisher.pop(layer).reshape(weight.shape) * weight.double().square() / 2
        for _, members in picked:
            yield normalize(sum(slices(losses[name(m)], m.dim, m.indices).sum(1).cpu() for m in members), options.normalize)
