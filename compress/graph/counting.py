"""Exact parameters and multiply-accumulates of the cut network, without cutting it.

Every dimension of a parameter, and every dimension of an operation, has size n - sum over groups of (multiplicity x removed channels).
The multiplicity is the same for all channels of a group (a coefficient of the matrix A below) except where two groups overlap in a
dimension of an activation; those few are counted channel by channel. Then params = sum of products of sizes, and
MACs = sum of unit x products of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.errors import UserError
from compress.graph.groups import ChannelGroup
from compress.graph.labels import Array
from compress.graph.records import Cost


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one weight for one example.

    `macs` of the layer as it is, `shape` of the weight ([c_out, c_in / groups, ...] for a convolution).
    """

    weight: str
    macs: int
    shape: tuple[int, ...]


class Counter:
    """Counts from numbers of kept channels.

    Parameters
    ----------
    groups, component: the prunable groups, and the class of every atom.
    parameters: name -> (shape, dimension -> atoms).
    costs: operations of the whole example batch; totals are divided by `batch`.
    """

    def __init__(self, groups: Sequence[ChannelGroup], component: Array,
                 parameters: Mapping[str, tuple[tuple[int, ...], Mapping[int, Array]]], costs: Sequence[Cost], batch: int) -> None:
        self._groups = {group.name: (position, group.size) for position, group in enumerate(groups)}
        number = int(component.max()) + 1 if len(component) else 0
        self._component, self._batch = component, batch
        self._group, self._channel = np.full(number, -1), np.zeros(number, np.int64)
        for position, group in enumerate(groups):
            self._group[group.components] = position
            self._channel[group.components] = np.arange(group.size)
        self._sizes: list[int] = [1]
        self._rows: list[Array] = [np.zeros(len(groups), np.int64)]
        self._irregular: list[tuple[int, int, Array]] = []
        self._known: dict[int, int] = {}
        self._keep_alive: list[Array] = []
        self._params = self._table([(1, [dims.get(d, size) for d, size in enumerate(shape)]) for shape, dims in parameters.values()])
        self._macs = self._table([(cost.unit, cost.factors) for cost in costs])
        self._size, self._matrix = np.array(self._sizes), np.stack(self._rows)

    def _factor(self, atoms: Array) -> int:
        """The number of the size that `atoms` stand for."""
        if id(atoms) in self._known:
            return self._known[id(atoms)]
        classes = self._component[atoms]
        owner = self._group[classes]
        row, position = np.zeros(len(self._groups), np.int64), len(self._sizes)
        for group in np.unique(owner[owner >= 0]).tolist():
            size = next(size for place, size in self._groups.values() if place == group)
            counts = np.bincount(self._channel[classes[owner == group]], minlength=size)
            if (counts == counts[0]).all():
                row[group] = counts[0]
            else:
                self._irregular.append((position, group, counts))
        self._sizes.append(len(atoms))
        self._rows.append(row)
        self._known[id(atoms)] = position
        self._keep_alive.append(atoms)
        return position

    def _table(self, terms: list[tuple[int, list[Array | int]]]) -> tuple[Array, Array]:
        """Constants [terms] and size numbers [terms, factors]; number 0 is the size 1."""
        units, rows = [], []
        for unit, factors in terms:
            row = []
            for factor in factors:
                if isinstance(factor, int):
                    unit *= factor
                else:
                    row.append(self._factor(factor))
            units.append(unit)
            rows.append(row)
        width = max((len(row) for row in rows), default=1) or 1
        padded = [row + [0] * (width - len(row)) for row in rows]
        return np.array(units, dtype=np.int64), np.array(padded, dtype=np.int64).reshape(-1, width)

    def count(self, keep: Mapping[str, Tensor]) -> tuple[int, int]:
        """(parameters, MACs) where group `name` keeps the channels `keep[name]`; groups that are not named keep all."""
        removed = np.zeros(len(self._groups), np.int64)
        for name, kept in keep.items():
            if name not in self._groups:
                raise UserError(f"{name!r} is not a prunable channel group of this network.")
            position, size = self._groups[name]
            removed[position] = size - len(kept)
        sizes = self._size - self._matrix @ removed
        if self._irregular:
            names = list(self._groups)
            for number, group, counts in self._irregular:
                if names[group] in keep:
                    sizes[number] -= counts.sum() - counts[np.asarray(keep[names[group]], dtype=np.int64)].sum()
        params, macs = (int((units * sizes[rows].prod(axis=1)).sum()) for units, rows in (self._params, self._macs))
        return params, macs // self._batch

    def layers(self, costs: Sequence[Cost], shapes: Mapping[str, tuple[int, ...]]) -> list[LayerCost]:
        """MACs of every weight, in the order of first use."""
        total: dict[str, int] = {}
        for cost in costs:
            if cost.weight in shapes:
                size = int(np.prod([factor if isinstance(factor, int) else len(factor) for factor in cost.factors], dtype=np.int64))
                total[cost.weight] = total.get(cost.weight, 0) + cost.unit * size
        return [LayerCost(weight, macs // self._batch, shapes[weight]) for weight, macs in total.items()]
