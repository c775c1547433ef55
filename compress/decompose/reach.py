"""What one EigenDamage round does under a budget and a pool fraction, and what any scores could reach under the cap.

A `pool_fraction` that the options set is what one round removes, as published; the budget then says where the rounds end. A round removes the
smaller of the two: the pool fraction as long as that does not meet the budget, and after that the least that does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.decompose.budget import Choice, choice_for
from compress.decompose.rounds import EigenDamageOptions, Scored, accepted, select
from compress.decompose.selection import Sides
from compress.decompose.targets import targets


def round_choice(scored: dict[str, Scored], options: EigenDamageOptions, needed: tuple[int, int] | None) -> Choice:
    """The choice of one round that has to save `needed` (parameters, MACs per image); None: that of the pool fraction alone.

    Raises
    ------
    UserError: no pool fraction is set, and `needed` is more than the cap allows.
    """
    if needed is not None and not any(needed):
        return Choice(select(scored, options, 0.0), frozenset())
    if needed is not None and options.stepwise:
        published = choice_for(scored, options, None)
        if any(have < want for have, want in zip(saved(scored, published, options), needed, strict=True)):
            return published
    return choice_for(scored, options, needed)


def saved(scored: dict[str, Scored], choice: Choice, options: EigenDamageOptions) -> tuple[int, int]:
    """(parameters, MACs per image) that a choice saves."""
    return _sum(accepted(scored, choice.kept, options, choice.split))


def most(model: nn.Module, calls: Mapping[str, Any], options: EigenDamageOptions, rounds: int, exclude: Sequence[str] = ()) -> tuple[int, int]:
    """A bound of what `rounds` rounds save (parameters, MACs per image) under the cap, whatever the scores are.

    calls: what every layer that the network calls is called with, as `layer_cost` takes it. Growth between rounds is left out, and so is that
    a layer can be split or get two factors only once.
    """
    scored = {}
    for name, source in targets(model, options.skip_last, exclude).items():
        if name in calls:
            weight = model.get_submodule(source).weight
            scored[name] = Scored(model.get_submodule(name), weight, (), Sides(*(torch.zeros(size) for size in weight.shape[:2])), calls[name])

    def savings(cuts: int) -> dict[str, tuple[int, int]]:
        kept = {name: Sides(*(torch.arange(_left(len(side), options.cap, cuts)) for side in entry.sides)) for name, entry in scored.items()}
        return accepted(scored, kept, options)

    # what the first cut at the cap does not replace stays as it is, and so does every later one
    first, last = savings(1), savings(rounds)
    # a layer that would get larger in one count may be cut less
    return _sum({name: (max(last[name][0], 0), max(last[name][1], 0)) for name in first if name in last})


def _left(size: int, cap: float, rounds: int) -> int:
    """Entries of a side after so many cuts at the cap, counted as `selection.keep` does."""
    for _ in range(rounds):
        size = max(1, size - int(cap * size + 1e-9))
    return size


def _sum(savings: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(pair[0] for pair in savings.values()), sum(pair[1] for pair in savings.values())
