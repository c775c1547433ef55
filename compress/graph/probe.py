"""Tries the groups before anybody relies on them.

A shape that stands in the program (`view(b, 64, -1)`, an assertion on a stored width) shows as an error when a network without numbers
is cut and run; a constant that changes the meaning silently (`y[:, :8]`) shows when real numbers are compared. The first check costs one
run on the meta device for all groups together, the second is made only for groups that went through a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from compress.graph.channel_graph import ChannelGraph
from compress.graph.copies import quiet, real_copy
from compress.graph.groups import ChannelGroup
from compress.graph.records import Assumption
from compress.graph.verify import LastOperator, Verdict, one_line
from compress.surgery import apply_prune


FEW = 4


def failing(groups: list[ChannelGroup], fits: Callable[[list[ChannelGroup]], Verdict], verdicts: dict[ChannelGroup, Verdict],
            base: list[ChannelGroup] | None = None) -> list[ChannelGroup]:
    """Bisects: fills `verdicts` with the groups that cannot be cut (beside those in `base`), and returns those that can."""
    base = [] if base is None else base
    verdict = fits(base + groups)
    if verdict:
        return base + groups
    if len(groups) == 1:
        verdicts[groups[0]] = verdict
        return base
    half = len(groups) // 2
    return failing(groups[half:], fits, verdicts, failing(groups[:half], fits, verdicts, base))


def sample(groups: Iterable[ChannelGroup]) -> dict[ChannelGroup, Any]:
    """About 40 % of every group's channels, the same at every call; at least one goes and one stays."""
    rng = np.random.default_rng(0)
    return {g: torch.from_numpy(np.sort(rng.choice(g.size, min(g.size - 1, max(1, round(0.4 * g.size))), replace=False))) for g in groups}


def shapes_of(model: nn.Module, inputs: tuple) -> list[torch.Size]:
    """The shapes of the outputs."""
    with quiet():
        return [leaf.shape for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor)]


def probe_shapes(graph: ChannelGraph, model: nn.Module, inputs: tuple) -> tuple[dict[ChannelGroup, Verdict], list[Assumption]]:
    """Groups whose removal makes `model` (a copy, on the meta device where possible) fail or change its output shapes.

    Where the run stops at an operator whose constants were guessed, the guesses made on that line of the program are returned instead.
    Where it stops at another line that more than `FEW` groups reach (a block that the network repeats), all of these are taken for failing;
    fewer are told apart by bisection.
    """
    expected = shapes_of(model, inputs)
    removals = sample(group for group in graph.groups if group.prunable)

    suspects: list[Assumption] = []
    stops: list[int] = []

    def fits(groups: list[ChannelGroup]) -> Verdict:
        undo = apply_prune(model, graph.step({group: removals[group] for group in groups}))
        last = LastOperator()
        try:
            with last:
                got = shapes_of(model, inputs)
        except Exception as error:
            stops.append(last.calls)
            here = {(a.line, a.choice) for a in graph.assumptions if a.site[0] == last.calls}
            suspects.extend(a for a in graph.assumptions if (a.line, a.choice) in here and a.choice < a.options - 1)
            return Verdict(float("inf"), None, f"{last.name} does not follow: {one_line(error)}")
        finally:
            undo()
        return Verdict(0.0, None, "" if got == expected else "the output would change its shape")

    verdicts: dict[ChannelGroup, Verdict] = {}
    rest = list(removals)
    while rest and not (verdict := fits(rest)) and not suspects:
        culprits = [group for group in graph.at_line_of(stops.pop()) if group in rest] if stops else []
        if len(culprits) <= FEW:
            failing(rest, fits, verdicts)
            suspects.clear()
            break
        verdicts.update(dict.fromkeys(culprits, verdict))
        rest = [group for group in rest if group not in verdicts]
    return verdicts, suspects if not verdicts else []


def probe_values(graph: ChannelGraph, model: nn.Module) -> dict[ChannelGroup, Verdict]:
    """Groups whose removal changes more than the removed channels; `model` stays as it is.

    All groups are tried where a run in float64 is cheap (a width can also stand in the arithmetic, `y / y.shape[1]`), otherwise those
    that went through a guess.
    """
    groups = [group for group in graph.groups if group.prunable]
    if not graph.cheap:
        guessed = [graph.component_of(assumption.atoms) for assumption in graph.assumptions]
        touched = np.unique(np.concatenate(guessed)) if guessed else np.zeros(0, np.int64)
        groups = [group for group in groups if np.isin(group.components, touched).any()]
    removals, verdicts = sample(groups), {}  # type: ignore[var-annotated]
    if removals:
        failing(groups, lambda tried: graph.attempt(real_copy(model), {g: removals[g] for g in tried})[0], verdicts)
    return verdicts
