"""Labels: who every index of every dimension of every parameter is, and which of them stand or fall together.

An *atom* is one integer: index i of dimension d of one parameter or buffer, or a channel without a parameter behind it (a zero
channel of a padding, a constant). A tensor of shape [s_0, ..., s_k] carries `Labels.dims`: dimension -> int64 array [s_dim] of atoms.
A dimension without an entry is fixed: nobody may remove an index of it. Dimensions of size 1 never carry labels.

`Atoms` collects what the operators say about atoms: pairs that must be removed together (edges of an undirected graph, solved once
at the end by connected components), atoms that must stay (pins, with the reason), and the part that a weight's atom plays
(contracted: "in", produced: "out"; `ties` say which atoms of several weights become one when weights are added or multiplied).
"""

from __future__ import annotations

import bisect
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
        self.ties: list[tuple[Array, Array]] = []
        self._loose: list[tuple[int, int]] = []

    def new(self, size: int) -> Array:
        """`size` atoms that belong to no parameter."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def loose(self, size: int) -> Array:
        """Atoms of a dimension along which a tensor is the same everywhere, so that it may follow whatever it meets."""
        atoms = self.new(size)
        self._loose.append((self.count - size, self.count))
        return atoms

    def is_loose(self, atoms: Array) -> bool:
        """Whether these atoms came from `loose`."""
        place = bisect.bisect_right(self._loose, (int(atoms[0]), self.count + 1)) - 1
        return place >= 0 and self._loose[place][0] <= int(atoms.min()) and int(atoms.max()) < self._loose[place][1]

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
        return self._classes(self.edges)

    def read(self) -> Array:
        """bool [count]: atoms whose zeroing stands for their removal; where weights are summed before use, all the summands' atoms."""
        flags = self.flags(self.contracted)
        if self.ties and flags.any():
            classes = self._classes(self.ties)
            hit = np.zeros(self.count, dtype=bool)
            hit[classes[flags]] = True
            flags |= hit[classes]
        return flags

    def _classes(self, edges: list[tuple[Array, Array]]) -> Array:
        if not edges:
            return np.arange(self.count)
        a = np.concatenate([edge[0] for edge in edges])
        b = np.concatenate([edge[1] for edge in edges])
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
