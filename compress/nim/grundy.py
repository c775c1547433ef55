"""Values of the combinatorial games behind pruning (Sprague 1935, Grundy 1939), for two players who move alternately.

A position of several heaps is won by the player to move iff the nim-sum (XOR) of its heaps' Grundy values is not 0. Taking exactly one
weight (the published game): n mod 2, so that no choice matters. Taking 1..k weights: n mod (k + 1). Taking any number: n. For three or
more players there is no such theory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import reduce
from operator import xor

from compress.errors import UserError


def grundy(heap: int, largest: int | None = None) -> int:
    """Grundy value of a heap of which 1..`largest` weights may be taken (None: any number)."""
    if heap < 0 or (largest is not None and largest < 1):
        raise UserError(f"A heap has at least 0 weights and a move takes at least 1, got heap {heap!r} and largest move {largest!r}.")
    return heap if largest is None else heap % (largest + 1)


def subtraction_grundy(heap: int, amounts: Collection[int]) -> int:
    """Grundy value of a heap of which any of `amounts` weights may be taken, by the mex recursion in O(heap * len(amounts))."""
    values: list[int] = []
    for size in range(heap + 1):
        reachable = {values[size - amount] for amount in amounts if 0 < amount <= size}
        values.append(next(value for value in range(len(reachable) + 1) if value not in reachable))
    return values[heap]


def nim_sum(values: Iterable[int]) -> int:
    """XOR of the values."""
    return reduce(xor, values, 0)


def best_move(heaps: Sequence[int], largest: int | None = None) -> tuple[int, int]:
    """`(heap index, amount)`: a move to nim-sum 0 where there is one, else one weight off the largest heap.

    An addition of this toolkit; the published players never look at the heaps. Raises `UserError` where every heap is empty.
    """
    if not any(heaps):
        raise UserError("There is no move: every heap is empty.")
    total = nim_sum(grundy(heap, largest) for heap in heaps)
    for index, heap in enumerate(heaps):
        value = grundy(heap, largest)
        if total and value ^ total < value:
            return index, value - (value ^ total)
    return max(range(len(heaps)), key=lambda index: heaps[index]), 1
