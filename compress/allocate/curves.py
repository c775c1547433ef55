"""What removing channels costs, measured one group at a time: the sensitivity curves of the allocation "measured".

For each group the channels with the lowest scores are really removed, at a few fractions of its size, from a copy of the network, and the
outputs are compared on calibration images (`compress.allocate.outputs`): D(n) with n channels removed. Between the measured points D
is read from the lower convex hull, along n^e with the exponent e that joins two neighbouring points of it, so that the loss of one further channel, l[k] = D(k + 1) - D(k), never falls with k.

Losses of groups are treated as independent. Measuring the sensitivity of single layers this way is folklore of pruning (Li et al. 2017 plot it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.allocate.outputs import IMAGES, Outputs

FRACTIONS = (0.125, 0.25, 0.5, 0.75)

Cut = Callable[[dict[str, Tensor]], nn.Module]


def measure(graph: Any, model: nn.Module, scores: dict[str, Tensor], batches: Iterable[tuple[Any, Any]], cut: Cut, images: int = IMAGES,
            fractions: Sequence[float] = FRACTIONS) -> dict[str, Tensor]:
    """Loss that each further channel adds, `{group name: float64 [size]}`, in ascending order of the group's scores.

    Parameters
    ----------
    scores: `{group name: [size]}`, low = removed first.
    batches: pairs (inputs, targets) of calibration data; the first `images` of them are used, targets are not.
    cut: a new network without the given channels, `{group name: int64 [removed]}`.
    fractions: of a group's channels, removed at the measured points.

    Raises
    ------
    UserError: no images, or outputs that are no float tensor of logits [n, classes, ...].
    """
    reference = Outputs(model, batches, images)
    sizes = {group.name: group.size for group in graph.groups}
    found = {}
    for name, values in scores.items():
        order, points = torch.argsort(torch.as_tensor(values).double().cpu(), stable=True), [(0, 0.0)]
        for count in sorted({min(sizes[name] - 1, max(1, round(fraction * sizes[name]))) for fraction in fractions}):
            if count > 0:
                points.append((count, reference.divergence(cut({name: order[:count].sort().values}))))
        found[name] = marginals(points, sizes[name])
    return found


def marginals(points: Sequence[tuple[int, float]], size: int) -> Tensor:
    """l [size], non-negative and ascending, from measured points (n, D(n)) with n ascending from (0, 0)."""
    hull: list[tuple[int, float]] = []
    for n, loss in points:
        # An infinite or undefined divergence is a network that was destroyed: dearer than anything measured.
        point = (n, max(0.0, loss) if math.isfinite(loss) else 1e6)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    exponents = [math.log(above / below) / math.log(m / n) if below > 0 else math.inf for (n, below), (m, above) in pairwise(hull[1:])]
    # Nothing was measured between no channel and the first point: as behind it. A point above the straight line was: straight.
    exponents.insert(0, 1.0 if len(hull) > 1 and points[1][0] < hull[1][0] else exponents[0] if exponents else 2.0)
    curve = torch.zeros(size + 1, dtype=torch.float64)
    for (n, loss), (following, larger), exponent in zip(hull, hull[1:], exponents):
        curve[n: following + 1] = _between(n, loss, following, larger, exponent)
    last, loss = hull[-1]
    if last > 0:
        curve[last:] = loss * (torch.arange(last, size + 1, dtype=torch.float64) / last) ** min(exponents[-1], 8.0)
    return curve.diff().clamp(min=0).cummax(0).values


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _between(n: int, loss: float, following: int, larger: float, exponent: float) -> Tensor:
    """D at n..following: along the power of n that joins both points, or straight where there is none."""
    places = torch.arange(n, following + 1, dtype=torch.float64)
    if math.isinf(exponent) or exponent == 1.0:
        return loss + (larger - loss) * (places - n) / (following - n)
    return larger * (places / following) ** exponent
