"""Distance of a filter to the other filters of its layer (He et al. 2019, "Filter Pruning via Geometric Median").

    s_c = sum over c' of || w_c - w_c' ||_2        w_c: the slice of channel c, flattened, [c_in * k * k]

A filter near the geometric median of its layer can be represented by the others, whatever its own norm. Per layer divided by the
mean over the layer's channels (option `normalize`), averaged over the layers that produce the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.criteria import CRITERIA
from compress.criteria.base import Magnitude

_ROWS = 256


@CRITERIA.register("geometric_median")
class GeometricMedian(Magnitude):
    """Sum of Euclidean distances to the other slices of the layer."""

    name = "geometric_median"

    @staticmethod
    def layer(rows: Tensor) -> Tensor:
        # Distances by matrix product lose digits with the square of the common offset, and the mean does not change a distance.
        rows = rows - rows.mean(0)
        sums = []
        for start in range(0, len(rows), _ROWS):
            distances = torch.cdist(rows[start:start + _ROWS], rows)
            distances.diagonal(start).zero_()
            sums.append(distances.sum(1))
        return torch.cat(sums)
