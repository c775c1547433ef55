"""Shapes that a mask may take: single weights, N of M, blocks, vector blocks.

A weight `[c_out, c_in, k...]` is viewed as the matrix `[c_out, K]` of the matrix product that the layer is, K = k... * c_in with c_in
fastest (the order of channels-last kernels). `Block(rows, cols)` removes rectangles of it; `VectorBlock(64)` is Block(64, 1): 64 output
channels share their kept columns. `NofM(2, 4)` keeps the n best of every m consecutive input channels.

A pattern turns scores into units: `units(score, alive) -> (value [u], size [u])`, and `spread(keep [u], shape) -> mask`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UserError


def to_matrix(weight: Tensor) -> Tensor:
    """`[c_out, c_in, k...]` as `[c_out, prod(k) * c_in]`, input channels fastest."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `to_matrix`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself."""

    name = "unstructured"

    def units(self, score: Tensor, alive: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the surviving weights, in the order of the tensor; size None stands for 1 each."""
        return score[alive], None

    def spread(self, keep: Tensor, alive: Tensor) -> Tensor:
        """The mask whose surviving entries are `keep`."""
        mask = torch.zeros_like(alive)
        mask[alive] = keep
        return mask


@dataclass(frozen=True)
class Block:
    """Rectangles of `rows` output channels and `cols` columns; border rectangles may be smaller. The unit's value is its mean score."""

    rows: int
    cols: int = 1

    @property
    def name(self) -> str:
        """`block-<rows>x<cols>`."""
        return f"block-{self.rows}x{self.cols}"

    def _tiles(self, matrix: Tensor) -> Tensor:
        high, wide = matrix.shape
        padded = F.pad(matrix, (0, -wide % self.cols, 0, -high % self.rows))
        tiles = padded.reshape(padded.shape[0] // self.rows, self.rows, padded.shape[1] // self.cols, self.cols)
        return tiles.sum((1, 3))

    def units(self, score: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean scores and numbers of surviving weights of the rectangles that have any."""
        if score.dim() < 2:
            raise UserError(
                f"Mask pattern {self.name!r} needs weights with at least 2 dimensions, got shape {tuple(score.shape)}; use another scope."
            )
        size = self._tiles(to_matrix(alive).double()).flatten()
        value = self._tiles(to_matrix(torch.where(alive, score.double(), 0.0))).flatten()
        found = size > 0
        return value[found] / size[found], size[found].long()

    def spread(self, keep: Tensor, alive: Tensor) -> Tensor:
        """The mask that keeps the surviving weights of the kept rectangles."""
        matrix = to_matrix(alive)
        tiles = self._tiles(matrix.double())
        kept = torch.zeros_like(tiles, dtype=torch.bool)
        kept[tiles > 0] = keep
        full = kept.repeat_interleave(self.rows, 0)[: matrix.shape[0]].repeat_interleave(self.cols, 1)[:, : matrix.shape[1]]
        return from_matrix(full & matrix, alive.shape)


def VectorBlock(channels: int = 64) -> Block:
    """`channels` output channels share the list of their kept columns."""
    return Block(channels, 1)


@dataclass(frozen=True)
class NofM:
    """The n best of every m consecutive input channels, for each output channel and kernel position.

    A layer whose input channels are no multiple of m stays dense.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UserError(f"An n:m mask pattern needs 1 <= n <= m, got {self.n}:{self.m}.")

    @property
    def name(self) -> str:
        """`<n>:<m>`."""
        return f"{self.n}:{self.m}"

    def mask(self, score: Tensor, alive: Tensor) -> Tensor:
        """The mask of one weight; ties keep the earlier channel."""
        if score.dim() < 2 or score.shape[1] % self.m:
            return alive.clone()
        ranked = torch.where(alive, score.double(), -torch.inf)
        groups = to_matrix(ranked).reshape(-1, self.m)
        order = groups.argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : self.n], True)
        return from_matrix(keep.reshape(score.shape[0], -1), score.shape) & alive


Pattern = Unstructured | Block | NofM
UNSTRUCTURED = Unstructured()


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, `2:4`, `block-16x16`, `vector-64` or `vector-128` as a pattern."""
    try:
        if text == "unstructured":
            return Unstructured()
        if text.startswith("vector-"):
            return VectorBlock(_positive(text[7:]))
        if text.startswith("block-"):
            rows, cols = text[6:].split("x")
            return Block(_positive(rows), _positive(cols))
        n, m = text.split(":")
        return NofM(_positive(n), _positive(m))
    except UserError:
        raise
    except ValueError:
        raise UserError(
            f"Unknown mask pattern {text!r}; known: unstructured, N:M (2:4), block-RxC (block-16x16), vector-V (vector-64)."
        ) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
