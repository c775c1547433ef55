"""What a trace writes down beside labels: costs, attributes that count channels, guesses about constants."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress.graph.labels import Array


@dataclass
class Cost:
    """`unit * product over factors` multiply-accumulates; a factor is the label array of a dimension, or its fixed size."""

    weight: str
    unit: int
    factors: list[Array | int]


@dataclass
class Count:
    """Attribute `attribute` of module `module` holds how many of these atoms are left."""

    module: str
    attribute: str
    atoms: Array


@dataclass
class Assumption:
    """A guess about a constant in the program (`y[:, :8]`: half, or eight?), checked on real numbers before it is used.

    `site`: running number of the call, and of the guess within it. `line`: "file:number" of the program's line.
    """

    site: tuple[int, int]
    options: int
    choice: int
    op: str
    line: str
    atoms: list[Array] = field(default_factory=list)
