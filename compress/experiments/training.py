"""Pruning during training: at given optimizer steps the masks shrink, and the training goes on with the same optimizer.

A phase is the steps between two prunes. The record of a run has one entry per phase: the sparsity in it, the test accuracy just after the
prune and at its end, the steps, and their cost in steps of the dense network (steps times MAC fraction).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compress.config import TrainConfig
from compress.data import DataBundle
from compress.data.split import batch_bounds
from compress.effective import layer_macs
from compress.masks import Masks, prune
from compress.train import evaluate, fit

Pruner = Callable[[Masks, float], None]


def by_magnitude(masks: Masks, sparsity: float) -> None:
    """Global magnitude pruning to a sparsity."""
    prune(masks, "magnitude", 1 - sparsity)


def mac_fraction(masks: Masks, input_shape: Sequence[int]) -> float:
    """MACs of the masked network over those of the dense one."""
    macs = layer_macs(masks.model, input_shape)
    density = masks.layer_density()
    return sum(cost * density.get(name, 1.0) for name, cost in macs.items()) / sum(macs.values())


def steps_per_epoch(data: DataBundle, batch_size: int) -> int:
    """Optimizer steps in one pass over the training images."""
    return len(batch_bounds(len(data.train), batch_size, min_last=2))


def train_in_phases(
    masks: Masks,
    data: DataBundle,
    cfg: TrainConfig,
    *,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    sparsities: Sequence[float | None],
    steps: Sequence[int],
    pruner: Pruner = by_magnitude,
    at_phase_end: Callable[[int], None] | None = None,
    log: Callable[[str], None] | None = None,
    every: bool = True,
) -> list[dict[str, Any]]:
    """Prune to `sparsities[k]` (None: leave the masks) and train `steps[k]` steps, for every phase k; one record per phase.

    All phases are one training: one optimizer, one learning-rate schedule over the sum of the steps, one order of the data. Without `every`
    only the accuracy at the very end is measured (the others are None).
    """
    records: list[dict[str, Any]] = []
    ends = [sum(steps[: k + 1]) for k in range(len(steps))]
    done = 0

    def test(wanted: bool) -> float | None:
        if not wanted:
            return None
        return evaluate(masks.model, data.test, eval_batch_size)["accuracy"]

    def begin(phase: int) -> None:
        target = sparsities[phase]
        if target is not None:
            pruner(masks, target)
        fraction = mac_fraction(masks, data.input_shape)
        records.append({
            "phase": phase, "sparsity": 1 - masks.density, "step": done, "steps": steps[phase], "mac_fraction": fraction,
            "mac_steps": steps[phase] * fraction, "accuracy_pruned": test(every),
        })  # fmt: skip

    def end(phase: int) -> None:
        records[phase]["accuracy"] = test(every or phase + 1 == len(steps))
        if at_phase_end is not None:
            at_phase_end(phase)

    def after_step() -> None:
        nonlocal done
        done += 1
        while len(records) < len(ends) and done == ends[len(records) - 1]:
            end(len(records) - 1)
            begin(len(records))

    begin(0)
    while len(records) < len(ends) and ends[len(records) - 1] == 0:
        end(len(records) - 1)
        begin(len(records))
    if ends[-1]:
        cfg = cfg.model_copy(update={"epochs": -(-ends[-1] // steps_per_epoch(data, batch_size))})
        fit(
            masks.model,
            data,
            cfg,
            batch_size=batch_size,
            seed=seed,
            steps=ends[-1],
            after_step=after_step,
            log=log,
            eval_batch_size=eval_batch_size,
        )
    end(len(records) - 1)
    return records
