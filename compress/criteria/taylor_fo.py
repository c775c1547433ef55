"""First-order Taylor importance (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning").

    s_c = E_batches[ ( sum over the slices of channel c of g * w )^2 ]        g = dL/dw, L the mean loss of the batch

Batches weigh by their number of samples. The sum runs over all members of a group before it is squared, because they go together. Which
slices count (option `slices`):

    producer    the weights that produce the channel (roles "out"), the published "weight" variant
    gate        the weights that read the channel (roles "in"). Their sum equals z * dL/dz summed over positions, with z the
                channel where it is read, so this is the published "gate" variant (a unit gate behind BatchNorm; ReLU and
                pooling pass it through), and minus the sum is the exact first-order effect of what surgery removes
    norm        scale and shift of the group's normalisation layers

Scores are squared losses, so they compare over layers as they are (`normalize="none"`, as published).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.base import NORMS, Criterion, Normalize, Options, normalize
from compress.criteria.linearize import batch_products
from compress.errors import UserError


class TaylorFoOptions(Options):
    """Options of `taylor_fo`."""

    slices: Literal["gate", "producer", "norm"] = Field("gate", description="which slices of a channel are summed")
    normalize: Normalize = Field("none", description="divide each group's scores by this")


@CRITERIA.register("taylor_fo")
class TaylorFo(Criterion):
    """Mean squared first-order change of the loss."""

    name = "taylor_fo"
    needs_data = True
    Options = TaylorFoOptions

    lacks = "it has no slices of the kind that the option `slices` names"

    @classmethod
    def members(cls, group, owners, options):
        if options.slices == "norm":
            return [m for m in group.members if isinstance(owners.get(m.parameter), NORMS)
                    and m.parameter.rpartition(".")[2] in ("weight", "bias")]
        role = {"gate": "in", "producer": "out"}[options.slices]
        return [m for m in group.members if m.role == role]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        squares = {group.name: torch.zeros(group.size, dtype=torch.float64) for group, _ in picked}
        total = 0
        for count, products in batch_products(model, {group.name: members for group, members in picked}, batches, loss_fn):
            total += count
            for name, value in products.items():
                squares[name] += count * value**2
        if total == 0:
            raise UserError("Criterion 'taylor_fo' needs calibration images, and got no batch.")
        for group, _ in picked:
            yield normalize(squares[group.name] / total, options.normalize)
