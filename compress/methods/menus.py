"""Menus of ranks: what each layer would lose and cost at each rank, and the choice that fits a budget.

Symbols: W [o, c, kh, kw] or [o, c]; s singular values; tail_o(r), tail_c(r) energy of the output (input) mode beyond its r leading directions.
Loss of rank r: svd tail(r), exact; Tucker-2 min(tail_o(r_o) + tail_c(r_c), all), an upper bound (De Lathauwer et al. 2000); CP
the error of a nested SVD, an upper bound. Unweighted losses are fractions of ||W||^2; K-FAC losses are 1/2 tail of the whitened
weight times the layer's scale, on one scale for the whole network. Of a matrix or 1x1 kernel Tucker-2 keeps two factors and one rank: tail(r).
Costs are bilinear in the ranks, so that four counted blocks give all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from compress.allocate.knapsack import Option, knapsack
from compress.decompose.factors import Factors
from compress.decompose.modules import Calls, as_calls, factors_cost, layer_cost

STEPS = {1: 64, 2: 20}  # ranks tried per side, by the number of ranks of the decomposition

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Menu:
    """One layer's options; option 0 keeps it as it is (`ranks[0]` is None)."""

    name: str
    ranks: tuple[Ranks | None, ...]
    losses: tuple[float, ...]
    costs: tuple[tuple[int, int], ...]


def tails(matrix: Tensor) -> Tensor:
    """Energy beyond the r leading singular directions, [min(rows, columns) + 1], float64: all of it at r = 0, zero at full rank."""
    energy = torch.linalg.svdvals(matrix.double()).square()
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def build_menu(name: str, module: nn.Module, inputs: tuple[int, ...] | Calls, shape: Callable[[Ranks], Factors], largest: Ranks,
               loss: Callable[[Ranks], float], round_to: int = 1) -> Menu:
    """The layer's menu.

    Parameters
    ----------
    inputs: what the layer is called with, as `layer_cost` takes it.
    shape: factors (any values) of the block at given ranks; called with ranks of 1 and 2 only.
    largest: the largest rank of each side.
    loss: estimated loss at given ranks.
    round_to: ranks are multiples of this on every side that is at least as wide.
    """
    calls = as_calls(inputs)
    dense = layer_cost(module, calls)
    options: list[tuple[Ranks | None, float, tuple[int, int]]] = [(None, 0.0, dense)]
    # of all images together: rounded to one image the counts would not be bilinear any more
    total = _bilinear(lambda ranks: factors_cost(module, shape(ranks), Calls(calls.shapes)), largest)
    for ranks in product(*(_ladder(size, STEPS[len(largest)], round_to) for size in largest)):
        parameters, macs = total(ranks)
        found = parameters, macs // calls.images
        if found[0] < dense[0] and found[1] < dense[1]:
            options.append((ranks, loss(ranks), found))
    return Menu(name, *map(tuple, zip(*options)))


def choose(menus: list[Menu], quantity: int, limit: float) -> list[int]:
    """The option of each menu with the least total loss whose total of `quantity` (0 parameters, 1 MACs) is at most `limit`."""
    fronts = [front(menu, quantity) for menu in menus]
    found = knapsack([[Option(menu.losses[i], (menu.costs[i][quantity],)) for i in front] for menu, front in zip(menus, fronts)], [limit])
    return [front[index] for front, index in zip(fronts, found)]


def uniform(menus: list[Menu], quantity: int, limit: float) -> list[int]:
    """The same fraction of every layer's own cost, bisected: each layer takes its best option below that fraction."""

    def at(share: float) -> list[int]:
        result = []
        for menu in menus:
            fitting = [i for i, cost in enumerate(menu.costs) if cost[quantity] <= share * menu.costs[0][quantity]]
            result.append(min(fitting or [min(range(len(menu.costs)), key=lambda i: menu.costs[i][quantity])], key=lambda i: menu.losses[i]))
        return result

    def total(choice: list[int]) -> int:
        return sum(menu.costs[i][quantity] for menu, i in zip(menus, choice))

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) <= limit else (low, middle)
    return at(low)


def least(menus: list[Menu], quantity: int) -> int:
    """The smallest total that the menus allow."""
    return sum(min(cost[quantity] for cost in menu.costs) for menu in menus)


def front(menu: Menu, quantity: int) -> list[int]:
    """Options that no other one beats in both loss and cost, cheapest first."""
    order = sorted(range(len(menu.ranks)), key=lambda i: (menu.costs[i][quantity], menu.losses[i]))
    front: list[int] = []
    for i in order:
        if not front or menu.losses[i] < menu.losses[front[-1]]:
            front.append(i)
    return front


def _ladder(size: int, steps: int, round_to: int) -> list[int]:
    unit = round_to if round_to <= size else 1
    return sorted({max(1, round(size // unit * i / steps)) * unit for i in range(1, steps + 1)})


def _bilinear(counted: Callable[[Ranks], tuple[int, int]], largest: Ranks) -> Callable[[Ranks], tuple[int, int]]:
    """The cost at any ranks from blocks counted at ranks 1 and 2 (a side of width 1 has rank 1 only)."""
    corner = {ranks: counted(ranks) for ranks in product(*((1, 2) if size > 1 else (1,) for size in largest))}
    base = corner[(1,) * len(largest)]

    def value(ranks: Ranks, q: int) -> int:
        result = base[q]
        steps = []
        for side, rank in enumerate(ranks):
            upper = tuple(2 if side == other else 1 for other in range(len(ranks)))
            steps.append(corner[upper][q] - base[q] if upper in corner else 0)
            result += (rank - 1) * steps[-1]
        if len(ranks) == 2 and (2, 2) in corner:
            result += (ranks[0] - 1) * (ranks[1] - 1) * (corner[2, 2][q] - base[q] - steps[0] - steps[1])
        return result

    return lambda ranks: (value(ranks, 0), value(ranks, 1))
