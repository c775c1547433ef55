"""Score, select, mask, in one or several rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.masks.buffers import Masks
from compress.masks.patterns import UNSTRUCTURED, NofM, Pattern
from compress.masks.select import check_density, select
from compress.saliency import SALIENCY, Batches, Loss, score_weights
from compress.schedule import targets


def inverted(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Negated scores: the highest is removed first (an ablation); protected weights (+inf) stay protected."""
    return {name: torch.where(score == torch.inf, score, -score) for name, score in scores.items()}


def prune(
    masks: Masks,
    criterion: str = "magnitude",
    density: float | None = None,
    *,
    iterations: int | None = None,
    schedule: str = "geometric",
    pool: str = "global",
    pattern: Pattern = UNSTRUCTURED,
    allow_empty: bool = False,
    invert: bool = False,
    batches: Batches | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    generator: torch.Generator | None = None,
    options: dict[str, Any] | None = None,
    observe: Callable[[int, dict[str, Tensor], dict[str, Tensor]], None] | None = None,
) -> list[float]:
    """Prune the network under `masks` to `density` and return the density after each round.

    `iterations` rounds of scoring and selecting (default: the criterion's own; one for `n:m`) follow `schedule` (a name of
    `compress.schedule`) from the present density. `density` None removes what the criterion does not protect (a threshold). `invert`
    removes the highest scores first. `observe(round, scores, new masks)` is called before the new masks are taken over. All or
    nothing: where a round fails, weights and masks are as before.

    Raises `UserError` as `select` and `score_weights` do.
    """
    found = SALIENCY[criterion]
    rounds = 1 if density is None or isinstance(pattern, NofM) else (found.iterations if iterations is None else iterations)
    if rounds < 1:
        raise UserError(f"The number of pruning iterations must be at least 1, got {iterations!r}.")
    if density is None and not isinstance(pattern, NofM) and not {"threshold"} & set(options or {}):
        raise UserError(f"Weight criterion {criterion!r} needs a density in (0, 1].")
    if density is None or isinstance(pattern, NofM):
        stages: list[float | None] = [density]
    else:
        check_density(density)
        present = masks.density
        stages = [1 - sparsity for sparsity in targets(schedule, rounds, max(1 - density, 1 - present), start=1 - present)]
    history: list[float] = []
    undo = masks.state()
    try:
        for index, stage in enumerate(stages):
            scores = score_weights(
                masks.model, masks.names, criterion, batches=batches, loss_fn=loss_fn, generator=generator, **(options or {})
            )
            if invert:
                scores = inverted(scores)
            chosen = select(scores, dict(masks.items()), stage, pool=pool, pattern=pattern, allow_empty=allow_empty)
            if observe is not None:
                observe(index, scores, chosen)
            masks.update(chosen)
            history.append(masks.density)
    except BaseException:
        masks.restore(undo)
        raise
    return history
