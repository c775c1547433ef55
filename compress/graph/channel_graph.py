"""The channel graph of a network: its groups, what they cost, and their removal."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import LongTensor, Tensor, nn

from compress.errors import RunError, UserError
from compress.graph.adapters import attributes_of
from compress.graph.copies import real_copy
from compress.graph.counting import Counter, LayerCost
from compress.graph.groups import IN, OUT, ChannelGroup
from compress.graph.labels import Array
from compress.graph.mode import Trace
from compress.graph.records import Assumption, Cost
from compress.graph.verify import FLOAT64_MACS, Verdict, compare, mask
from compress.plan import Plan
from compress.surgery import Step, apply_prune, named_tensors

Removals = Mapping["str | ChannelGroup", "Tensor | Sequence[int]"]


class CoverageRow(NamedTuple):
    """What can be done to one layer.

    `status`: "pruned" (its output channels form a group of their own), "coupled" (they go together with those of other layers),
    "pinned" (`reason` says why they stay).
    """

    layer: str
    status: str
    reason: str


class ChannelGraph:
    """Built by `compress.graph.trace`.

    Attributes
    ----------
    groups: every channel group; those with `prunable` False carry a `reason`.
    pinned: parameter name -> why its output channels (or the only labelled dimension) stay.
    layers: `LayerCost` of every weight that was contracted.
    verdict: what the check of the last `prune` found; None before the first, or where it was not asked for.
    """

    def __init__(self, skeleton: nn.Module, inputs: tuple, trace: Trace, groups: list[ChannelGroup], component: Array,
                 reasons: dict[int, str], tensors: dict[str, tuple[tuple[int, ...], dict[int, Array]]], trainable: set[str],
                 batch: int) -> None:
        self.groups = groups
        self._skeleton, self._inputs, self._trace, self._component, self._batch = skeleton, inputs, trace, component, batch
        self._reasons, self._tensors, self._trainable = reasons, tensors, trainable
        self._counter: Counter | None = None
        self.verdict: Verdict | None = None

    def _counting(self) -> Counter:
        if self._counter is None:
            parameters = {name: entry for name, entry in self._tensors.items() if name in self._trainable}
            self._counter = Counter([g for g in self.groups if g.prunable], self._component, parameters, self._costs, self._batch)
        return self._counter

    @property
    def assumptions(self) -> list[Assumption]:
        """Constants of the program that the trace had to guess about."""
        return self._trace.assumptions

    def at_line_of(self, call: int) -> list[ChannelGroup]:
        """Prunable groups whose channels reach the program's line that makes call number `call` (from 1)."""
        line = self._trace.history[call - 1][0]
        arrays = [atoms for other, reached in self._trace.history if other == line for atoms in reached]
        classes = self.component_of(arrays) if arrays else np.zeros(0, np.int64)
        return [group for group in self.groups if group.prunable and np.isin(group.components, classes).any()]

    def component_of(self, atoms: list[Array]) -> Array:
        """The classes of some atoms."""
        return np.unique(self._component[np.concatenate(atoms)])

    @property
    def cheap(self) -> bool:
        """Whether a forward pass of the example in float64 costs little."""
        return self.count()[1] * self._batch <= FLOAT64_MACS

    def free(self, atoms: list[Array]) -> bool:
        """Whether any of these atoms may be removed."""
        prunable = np.concatenate([np.zeros(0, np.int64), *(group.components for group in self.groups if group.prunable)])
        return bool(np.isin(self.component_of(atoms), prunable).any())

    @property
    def _costs(self) -> list[Cost]:
        return self._trace.costs

    @property
    def grouped(self) -> dict[str, str]:
        """How the weights of convolutions in groups lose channels: "position" (the same ones in each group) or "group" (whole groups), by parameter."""
        return dict(self._trace.grouped)

    @property
    def layers(self) -> list[LayerCost]:
        """MACs per weight and example."""
        return self._counting().layers(self._costs, {name: shape for name, (shape, _) in self._tensors.items()})

    def count(self, keep: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
        """(parameters, MACs per example) of the network whose group `name` keeps the channels `keep[name]`."""
        return self._counting().count(keep or {})

    @property
    def pinned(self) -> dict[str, str]:
        """Parameters whose channels stay, with the reason."""
        found: dict[str, str] = {}
        free = {member.parameter for group in self.groups if group.prunable for member in group.members if member.role != IN}
        for group in self.groups:
            if not group.prunable:
                for member in group.members:
                    if member.role != IN and member.parameter in self._trainable and member.parameter not in free:
                        found.setdefault(member.parameter, group.reason)
        for name, (_, dims) in self._tensors.items():
            if name in self._trainable and name not in free and name not in found:
                why = [self._reasons[c] for atoms in dims.values() for c in self._component[atoms[:1]].tolist() if c in self._reasons]
                if not dims or why or len(dims) == len(self._tensors[name][0]):
                    found[name] = why[0] if why else "no operator reads its channels"
        return found

    def coverage(self) -> list[CoverageRow]:
        """One row per layer (module with a parameter of two or more dimensions), in the network's order."""
        owner: dict[str, ChannelGroup] = {}
        for group in self.groups:
            for member in group.members:
                if member.role == OUT and (member.parameter not in owner or group.prunable):
                    owner[member.parameter] = group
        pinned, rows = self.pinned, []
        for name, (shape, _) in self._tensors.items():
            if name not in self._trainable or len(shape) < 2:
                continue
            layer, group = name.rpartition(".")[0] or name, owner.get(name)
            if group is None or not group.prunable:
                reason = group.reason if group is not None else pinned.get(name, "its channels were not reached")
                rows.append(CoverageRow(layer, "pinned", reason))
                continue
            producers = dict.fromkeys(member.parameter for member in group.members if member.role == OUT)
            others = [producer for producer in producers if producer != name]
            rows.append(CoverageRow(layer, "coupled" if others else "pruned", f"with {', '.join(others)}" if others else ""))
        return rows

    def _channels(self, removals: Removals) -> dict[ChannelGroup, LongTensor]:
        """Checked channel numbers per group, sorted; groups from which nothing is removed are left out."""
        by_name = {group.name: group for group in self.groups}
        found: dict[ChannelGroup, LongTensor] = {}
        for key, given in removals.items():
            name = key.name if isinstance(key, ChannelGroup) else key
            if name not in by_name:
                close = difflib.get_close_matches(name, by_name, n=1)
                raise UserError(f"There is no channel group {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}.")
            group, channels = by_name[name], torch.as_tensor(given, dtype=torch.long).flatten().cpu()
            if not len(channels):
                continue
            if not group.prunable:
                raise UserError(f"Channel group {name!r} cannot be pruned: {group.reason}.")
            unique = channels.unique()
            if len(unique) != len(channels) or unique[0] < 0 or unique[-1] >= group.size:
                raise UserError(f"Channels to remove from group {name!r} must be different numbers from 0 to {group.size - 1}, "
                                f"got {channels.tolist()}.")
            if len(unique) == group.size:
                raise UserError(f"All {group.size} channels of group {name!r} would be removed; at least one must stay.")
            found[group] = unique  # type: ignore[assignment]
        return found

    def _slices(self, channels: Mapping[ChannelGroup, LongTensor], roles: tuple[str, ...] | None = None) -> dict[str, dict[int, list[int]]]:
        slices: dict[str, dict[int, list[int]]] = {}
        for group, removed in channels.items():
            for member in group.members:
                if roles is None or member.role in roles:
                    slices.setdefault(member.parameter, {}).setdefault(member.dim, []).extend(member.indices[removed].flatten().tolist())
        return {name: {dim: sorted(indices) for dim, indices in sorted(dims.items())} for name, dims in slices.items()}

    def step(self, removals: Removals) -> Step:
        """The plan step that removes these channels; nothing is changed."""
        channels = self._channels(removals)
        slices = self._slices(channels)
        shapes = {}
        for name, dims in slices.items():
            before = self._tensors[name][0]
            shapes[name] = before, tuple(size - len(dims.get(dim, ())) for dim, size in enumerate(before))
        touched = {name.rpartition(".")[0] for name in shapes}
        attributes: dict[str, dict[str, Any]] = {}
        for name, module in self._skeleton.named_modules():
            if name in touched or any(owner.startswith(f"{name}.parametrizations") for owner in touched):
                values = attributes_of(name, module, shapes, self._trace.grouped)
                if values:
                    attributes[name] = values
        gone = np.zeros(int(self._component.max()) + 1 if len(self._component) else 0, dtype=bool)
        for group, removed in channels.items():
            gone[group.components[removed.numpy()]] = True
        modules = dict(self._skeleton.named_modules())
        for count in self._trace.counts:
            left = int((~gone[self._component[count.atoms]]).sum())
            if left != getattr(modules[count.module], count.attribute):
                attributes.setdefault(count.module, {})[count.attribute] = left
        as_json = {name: {str(dim): indices for dim, indices in dims.items()} for name, dims in slices.items()}
        return {"kind": "prune", "slices": as_json, "attributes": attributes}

    def to_plan(self, removals: Removals, meta: dict[str, Any] | None = None) -> Plan:
        """The plan with one step that removes these channels."""
        return Plan([self.step(removals)], meta or {})

    def _check_model(self, model: nn.Module) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        for name, (shape, _) in self._tensors.items():
            if shapes.get(name) != shape:
                given = list(shapes[name]) if name in shapes else "missing"
                raise UserError(f"Tensor {name!r} was {list(shape)} when the network was traced and is {given} now; trace it again.")

    def prune(self, model: nn.Module, removals: Removals, verify: bool = True, on_failure: str = "raise") -> Step:
        """Removes channels from `model` in place, all or nothing, and returns the plan step.

        Parameters
        ----------
        model: the traced network, or one with the same tensors.
        removals: group (or its name) -> channel numbers in 0 .. size - 1.
        verify: compare with the original with these channels zeroed where they are read (`compress.graph.verify`).
        on_failure: "raise" leaves the network as it was and raises RunError naming the groups that fail; "pin" pins these groups (their
            `reason` says why) and removes the rest.
        """
        if on_failure not in ("raise", "pin"):
            raise UserError(f"on_failure must be \"raise\" or \"pin\", got {on_failure!r}.")
        self._check_model(model)
        self.verdict = None
        channels = self._channels(removals)
        if not verify:
            step = self.step(channels)
            apply_prune(model, step)
            return step
        verdict, step = self.attempt(model, channels)
        if verdict:
            self.verdict = verdict
            return step
        from compress.graph.probe import failing

        verdicts: dict[ChannelGroup, Verdict] = {}

        def fits(groups: list[ChannelGroup]) -> Verdict:
            return self.attempt(real_copy(model), {group: channels[group] for group in groups})[0]

        failing(list(channels), fits, verdicts)
        if on_failure == "raise" or not verdicts:
            which = "; ".join(f"group {group.name!r}: {found.problem}" for group, found in verdicts.items()) or verdict.problem
            raise RunError(f"Pruning was taken back because the cut network is not the masked original ({which}).")
        for group, found in verdicts.items():
            group.pin(found.problem)
        self._counter = None
        verdict, step = self.attempt(model, {group: removed for group, removed in channels.items() if group.prunable})
        if not verdict:
            raise RunError(f"Pruning was taken back because the cut network is not the masked original ({verdict.problem}).")
        self.verdict = verdict
        return step

    def attempt(self, model: nn.Module, channels: Mapping[ChannelGroup, LongTensor]) -> tuple[Verdict, Step]:
        """Cuts and compares; takes the cut back where they differ."""
        step = self.step(channels)
        masked = real_copy(model)
        mask(masked, self._slices(channels, (IN,)))
        undo = apply_prune(model, step)
        try:
            verdict = compare(masked, real_copy(model), self._inputs, self.count()[1] * self._batch)
        except BaseException:
            undo()
            raise
        if not verdict:
            undo()
        return verdict, step
