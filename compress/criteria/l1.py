"""L1 norm of the weights that produce a channel (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

    s_c = sum over the slice of |w|        slice: row c of a weight [c_out, c_in, k, k] or [out, in]

Per layer divided by the mean over the layer's channels (option `normalize`), averaged over the layers that produce the group.
"""

from __future__ import annotations

from torch import Tensor

from compress.criteria import CRITERIA
from compress.criteria.base import Magnitude


@CRITERIA.register("l1")
class L1(Magnitude):
    """Sum of absolute weights of the producing slices."""

    name = "l1"

    @staticmethod
    def layer(rows: Tensor) -> Tensor:
        return rows.abs().sum(1)
