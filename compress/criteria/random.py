"""Random scores: the baseline that every criterion has to beat.

    s_c uniform in [0, 1), independent
"""

from __future__ import annotations

import torch

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion
from compress.errors import UserError


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform random scores from the generator that is given, drawn in the order of the groups."""

    name = "random"

    @classmethod
    def members(cls, group, owners, options):
        return group.members

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        if generator is None:
            raise UserError("Criterion 'random' needs a generator, and got none.")
        for group, _ in picked:
            yield torch.rand(group.size, generator=generator, dtype=torch.float64, device=generator.device)
