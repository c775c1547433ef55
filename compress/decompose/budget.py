"""How much one EigenDamage round removes: the published pool fraction, or as much as a budget of parameters and MACs asks for.

With a depthwise core (`eigendamage_depthwise`) splitting a layer at full width alone removes 60 to 90 % of it, so that splitting every
layer, as published, overshoots a small budget. Under a budget only as many layers are split as it needs: those with the least loss
1/2 sum_ij s_ij (W'_ij - V'_ij)^2 (V the split weight, s as in `eigen`) per share of the budget saved. The other layers stay in three factors or as they
are, and the pool fraction makes up what is still missing. A budget that splitting every layer does not meet splits all of them, and the
pool fraction does the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from compress.decompose.eigen import depthwise, importance
from compress.decompose.factors import Factors, recompose
from compress.decompose.rounds import EigenDamageOptions, Scored, accepted, apply_round, scores, select
from compress.decompose.selection import Sides
from compress.errors import UserError


class Choice(NamedTuple):
    """What one round does: kept indices of every layer, and the layers that get a depthwise core (None: all that can)."""

    kept: dict[str, Sides]
    split: frozenset[str] | None


def choice_for(scored: dict[str, Scored], options: EigenDamageOptions, needed: tuple[int, int] | None) -> Choice:
    """The choice that saves at least `needed` (parameters, MACs per image), or that of the options' pool fraction where None.

    Raises
    ------
    UserError: more than the cap allows; says what can be saved.
    """
    if needed is None:
        return Choice(select(scored, options), None)
    split = splits_for(scored, options, needed) if options.form == "depthwise" else None
    return Choice(select(scored, options, fraction_for(scored, options, needed, split)), split)


def fraction_for(scored: dict[str, Scored], options: EigenDamageOptions, needed: tuple[int, int], split: Collection[str] | None = None) -> float:
    """The smallest pool fraction that saves at least `needed` (parameters, MACs per image), by bisection on exact counts.

    Raises
    ------
    UserError: more than the cap allows; says what can be saved.
    """
    total = sum(entry.sides.rows.numel() + entry.sides.columns.numel() for entry in scored.values())

    def saved(count: int) -> tuple[int, int]:
        return _total(accepted(scored, select(scored, options, count / total), options, split).values())

    low, high = 0, total - 1
    if not _enough(saved(high), needed):
        parameters, macs = saved(high)
        raise UserError(f"This round can save at most {parameters} parameters and {macs} MACs under the cap of {options.cap:g}, "
                        f"but {needed[0]} and {needed[1]} are needed; use more rounds or a smaller ratio.")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _enough(saved(middle), needed) else (middle + 1, high)
    return low / total


def splits_for(scored: dict[str, Scored], options: EigenDamageOptions, needed: tuple[int, int]) -> frozenset[str] | None:
    """The layers whose splitting at full width comes closest to `needed` from below, cheapest first; None for all of them."""
    savings = accepted(scored, select(scored, options, 0.0), options)
    if not _enough(_total(savings.values()), needed):
        return None
    shares = {name: max(have / want for have, want in zip(saved, needed, strict=True) if want) for name, saved in savings.items()} if any(needed) else {}
    chosen: list[str] = []
    for name in sorted(shares, key=lambda name: split_loss(scored[name], "svd" if options.depthwise == "svd" else "cp") / shares[name]):
        if not _enough(_total(savings[other] for other in (*chosen, name)), needed):
            chosen.append(name)
    return frozenset(chosen)


def split_loss(entry: Scored, method: str = "cp") -> float:
    """Predicted loss of the layer's core once it is split at full width by this `method` of `depthwise`."""
    if entry.split_loss is None:
        outer = (torch.eye(size, dtype=entry.weight.dtype, device=entry.weight.device) for size in entry.weight.shape[1::-1])
        whole = Factors(next(outer), entry.weight, next(outer))
        change = recompose(depthwise(whole, method=method)) - entry.weight
        entry.split_loss = importance(change, *entry.spectra, entry.second)[0].sum().item() / 2
    return entry.split_loss


def _total(savings: Iterable[tuple[int, int]]) -> tuple[int, int]:
    parameters, macs = 0, 0
    for saved in savings:
        parameters, macs = parameters + saved[0], macs + saved[1]
    return parameters, macs


def _enough(saved: tuple[int, int], needed: tuple[int, int]) -> bool:
    return all(have >= want for have, want in zip(saved, needed, strict=True))


def eigendamage_round(model: nn.Module, batches: Iterable[Any], options: EigenDamageOptions, generator: torch.Generator | None = None,
                      exclude: Sequence[str] = (), needed: tuple[int, int] | None = None) -> list[str]:
    """One round in place: scores, threshold (`options.pool_fraction`, or bisected to save `needed` parameters and MACs), replacement.

    Returns the names of the replaced layers. Raises UserError as `scores` and `choice_for`.
    """
    scored = scores(model, batches, options, generator, exclude)
    kept, split = choice_for(scored, options, needed)
    return apply_round(model, scored, kept, options, split=split)
