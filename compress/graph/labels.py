"""Labels: who every index of every dimension of every parameter is, and which of them stand or fall together.

An *atom* is one integer: index i of dimension d of one parameter or buffer, or a channel without a parameter behind it (a zero
channel of a padding, a constant). A tensor of shape [s_0, ..., s_k] carries `Labels.dims`: dimension -> int64 array [s_dim] of atoms.
A dimension without an entry is fixed: nobody may remove an index of it. Dimensions of size 1 never carry labels.

`Atoms` collects what the operators say about atoms: pairs that must be removed together (edges of an undirected graph, solved once
at the end by connected components), atoms that must stay (pins, with the reason), and the part that a weight's atom plays
(contracted: "in", produced: "out").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Array = np.ndarray


@dataclass(slots=True)
class Labels:
    """Labels of one tensor.

    `source` is None for an activation, the parameter's name for a parameter and what was computed from parameters alone, and "" for
    a constant that a factory function made.
    """

    dims: dict[int, Array] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Dimension `dim` of the parameter or buffer `name` owns the atoms base .. base + size - 1."""

    name: str
    dim: int
    base: int
    size: int


class Atoms:
    """The atoms of one trace and everything known about them."""

    def __init__(self) -> None:
        self.count = 0
        self.owners: list[Owner] = []
        self.edges: list[tuple[Array, Array]] = []
        self.pins: list[tuple[Array, str]] = []
        self.contracted: list[Array] = []
        self.produced: list[Array] = []

    def new(self, size: int) -> Array:
        """`size` atoms that belong to no parameter."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def own(self, name: str, shape: tuple[int, ...]) -> dict[int, Array]:
        """Atoms for every dimension of a parameter or buffer."""
        dims = {}
        for dim, size in enumerate(shape):
            if size > 1:
                self.owners.append(Owner(name, dim, self.count, size))
                dims[dim] = self.new(size)
        return dims

    def join(self, a: Array, b: Array) -> None:
        """Elementwise (with broadcasting): these atoms are removed together."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        self.edges.append((a.ravel(), b.ravel()))

    def pin(self, atoms: Array | None, reason: str) -> None:
        """These atoms stay."""
        if atoms is not None and atoms.size:
            self.pins.append((atoms.ravel(), reason))

    def components(self) -> Array:
        """int64 [count]: the class of every atom."""
        if not self.edges:
            return np.arange(self.count)
        a = np.concatenate([edge[0] for edge in self.edges])
        b = np.concatenate([edge[1] for edge in self.edges])
        graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def reasons(self, component: Array) -> dict[int, str]:
        """Class -> why it is pinned (the first reason given)."""
        found: dict[int, str] = {}
        for atoms, reason in self.pins:
            for number in np.unique(component[atoms]).tolist():
                found.setdefault(number, reason)
        return found

    def flags(self, marks: list[Array]) -> Array:
        """bool [count]: the atoms named in `marks`."""
        flags = np.zeros(self.count, dtype=bool)
        for atoms in marks:
            flags[atoms] = True
        return flags
