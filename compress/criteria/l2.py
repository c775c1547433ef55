"""L2 norm of the weights that produce a channel (He et al. 2018, "Soft Filter Pruning").

    s_c = sqrt(sum over the slice of w^2)        slice: row c of a weight [c_out, c_in, k, k] or [out, in]

Per layer divided by the mean over the layer's channels (option `normalize`), averaged over the layers that produce the group.
"""

from __future__ import annotations

from torch import Tensor

from compress.criteria import CRITERIA
from compress.criteria.base import Magnitude


@CRITERIA.register("l2")
class L2(Magnitude):
    """Euclidean norm of the producing slices."""

    name = "l2"

    @staticmethod
    def layer(rows: Tensor) -> Tensor:
        return rows.norm(dim=1)
