"""C-OBD (Wang et al. 2019): s_i = 1/2 sum_j w_ij^2 F_ij, F_ij = E_n[(dL_n / dw_ij)^2] from gradients of single images; no compensation.

Labels are drawn from the network (`fisher="true"`). Positions and calls of a layer are summed before the square.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, Normalize, normalize, slices
from compress.criteria.second_order import CurvatureOptions, SecondOrder, by_layer, check_loss, modelled
from compress.curvature import squared_gradients


class CObdOptions(CurvatureOptions):
    """Options of `c_obd`."""

    fisher: Literal["true", "exact", "empirical"] = Field(
        "true", description="labels drawn from the network, all classes weighted, or the data's labels"
    )
    samples: int = Field(1, ge=1, description="labels drawn per image where fisher is true")
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
        check_loss(loss_fn, options.loss)
        scores, pairs = by_layer(picked, model)
        with modelled(model, options.loss):
            fisher = squared_gradients(
                model, batches, pairs, fisher=options.fisher, samples=options.samples, loss=options.loss, generator=generator)
        for layer, own in pairs.items():
            weight = model.get_submodule(layer).weight.detach()
            losses = fisher.pop(layer).reshape(weight.shape) * weight.double().square() / 2
            for score, member in own:
                score += slices(losses, member.dim, member.indices).sum(1).cpu()
        return [normalize(score, options.normalize) for score in scores]
