"""The pruning game: N players take weights off layers until the network is sparse enough.

* Heaps: layers, each with n_l weights; a heap's size is the number of its surviving weights.
* A move: the player takes the next weights of its own order, as many as the stride says. A stride is a number of weights, or a fraction f
  of the heap at the beginning of the round, then max(1, round(f * survivors)) weights. The same for all players of a round.
* A round: on one heap every player moves once. Order: `random` (drawn anew each round), `fixed`, or `round_robin` (the first player moves
  on by one place each round).
* A turn: one round on every heap whose own sparsity is at most the target. Turns repeat until the network's sparsity, zeros over weights,
  reaches the target. `exact` cuts the last move so that ceil(target * weights) are gone exactly.
* The game also ends where no player can move on any heap that is in play; it is then `exhausted`.

Weights do not change within a call of `play`, so each player sorts each heap once per call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from compress.errors import UserError
from compress.nim.players import Player

ORDERS = ("random", "fixed", "round_robin")


@dataclass(frozen=True)
class Move:
    """One player took `removed` weights with values in [low, high] off one layer."""

    step: int
    round: int
    layer: str
    player: str
    removed: int
    low: float
    high: float


@dataclass(frozen=True)
class Play:
    """Outcome of one call of `play`: its moves, the network's sparsity after it, and whether no player could move on."""

    moves: list[Move]
    sparsity: float
    exhausted: bool


class _Queue:
    """One player's order on one heap, read from the front, skipping what others took."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order
        self.start = 0

    def take(self, alive: np.ndarray, count: int) -> np.ndarray:
        """Up to `count` next surviving positions; they are taken off the heap `alive`."""
        width = 4 * count + 64
        while True:
            window = self.order[self.start : self.start + width]
            hits = np.flatnonzero(alive[window])
            if len(hits) >= count or self.start + width >= len(self.order):
                break
            width *= 4
        taken = window[hits[:count]]
        self.start += int(hits[count - 1]) + 1 if len(hits) >= count else len(window)
        alive[taken] = False
        return taken


class NimGame:
    """State of a game: which weights survive on each heap.

    Parameters
    ----------
    sizes:
        Heap sizes by layer name; `alive` may give the survivors at the start (boolean arrays), for networks that are already pruned.
    players, stride, order, seed:
        As described above. `stride` is an int (weights) or a float in (0, 1) (fraction).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        players: Sequence[Player],
        stride: float = 0.001,
        order: str = "random",
        seed: int = 0,
        alive: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise UserError("A pruning game needs at least one layer, and at least one weight in each.")
        if not players:
            raise UserError("A pruning game needs at least one player.")
        if not (isinstance(stride, int) and stride >= 1) and not (isinstance(stride, float) and 0 < stride < 1):
            raise UserError(f"The stride of a pruning game is a number of weights (1, 2, ...) or a fraction in (0, 1), got {stride!r}.")
        if order not in ORDERS:
            raise UserError(f"Unknown order of play {order!r}; known: {', '.join(ORDERS)}.")
        self.players = list(players)
        self.stride = stride
        self.order = order
        self.alive = {name: np.ones(size, dtype=bool) if alive is None else alive[name].reshape(-1).copy() for name, size in sizes.items()}
        self._generator = np.random.default_rng(seed)
        self._heap = {name: int(mask.sum()) for name, mask in self.alive.items()}
        self._steps = 0
        self._rounds = 0

    @property
    def heaps(self) -> dict[str, int]:
        """Surviving weights by layer."""
        return dict(self._heap)

    @property
    def total(self) -> int:
        """Weights of all layers, taken ones included."""
        return sum(len(mask) for mask in self.alive.values())

    @property
    def sparsity(self) -> float:
        """Zeros over weights, of the whole network."""
        return 1 - sum(self._heap.values()) / self.total

    def layer_sparsity(self, layer: str) -> float:
        """Zeros over weights of one layer."""
        return 1 - self._heap[layer] / len(self.alive[layer])

    def play(self, weights: Mapping[str, np.ndarray], target: float, exact: bool = False) -> Play:
        """Play until the network's sparsity is at least `target`; `weights` holds the present values by layer, any shape.

        Raises `UserError` unless 0 <= target < 1.
        """
        if not 0 <= target < 1:
            raise UserError(f"The target of a pruning game is a sparsity in [0, 1), got {target!r}.")
        self._steps += 1
        flat = {name: np.asarray(weights[name]).reshape(-1) for name in self.alive}
        queues: dict[str, list[_Queue]] = {}
        goal = math.ceil(target * self.total - 1e-6)
        moves: list[Move] = []
        exhausted = False
        while self._gone < goal and not exhausted:
            exhausted = True
            for layer in self.alive:
                if self.layer_sparsity(layer) > target or (exact and self._gone >= goal):
                    continue
                if layer not in queues:
                    standing = np.flatnonzero(self.alive[layer])
                    queues[layer] = [_Queue(player.rank(flat[layer], standing, self._generator)) for player in self.players]
                played = self._round(layer, flat[layer], queues[layer], goal if exact else self.total)
                exhausted = exhausted and not played
                moves += played
        return Play(moves, self.sparsity, exhausted)

    @property
    def _gone(self) -> int:
        return self.total - sum(self._heap.values())

    def _turn_order(self) -> Sequence[int]:
        count = len(self.players)
        if self.order == "fixed":
            return range(count)
        if self.order == "round_robin":
            return [(self._rounds + place) % count for place in range(count)]
        return self._generator.permutation(count).tolist()

    def _round(self, layer: str, weights: np.ndarray, queues: list[_Queue], most: int) -> list[Move]:
        stride = self.stride if isinstance(self.stride, int) else max(1, round(self.stride * self._heap[layer]))
        moves = []
        for index in self._turn_order():
            count = min(stride, most - self._gone)
            taken = queues[index].take(self.alive[layer], count) if count > 0 else ()
            if len(taken):
                self._heap[layer] -= len(taken)
                values = weights[taken]
                name = self.players[index].name
                moves.append(Move(self._steps, self._rounds, layer, name, len(taken), float(values.min()), float(values.max())))
        self._rounds += 1
        return moves


def append_moves(path: Path, moves: Sequence[Move]) -> None:
    """Append moves to a JSONL file, one object per line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(move)) + "\n" for move in moves)
