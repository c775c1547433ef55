"""From atoms to channel groups.

A class of joined atoms is one channel. Its signature is how many atoms it has in which dimension of which parameter; classes with
the same signature form a `ChannelGroup`, whose channels are interchangeable for a criterion (DESIGN: "all parameter slices that must
be removed together").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import LongTensor

from compress.graph.labels import Array, Atoms

OUT, IN, PARAM = "out", "in", "param"


@dataclass(frozen=True)
class Member:
    """Channel c of the group removes `indices[c]` ([size, m], int64) of dimension `dim` of the parameter or buffer `parameter`.

    `role`: "out" for the dimension that an operator produces (convolution weight, dimension 0), "in" for the one that is contracted
    (dimension 1), "param" for elementwise vectors (bias, BatchNorm and its buffers).
    """

    parameter: str
    dim: int
    indices: LongTensor
    role: str


@dataclass(eq=False)
class ChannelGroup:
    """Channels that are removed in the same places. `prunable` is False where `reason` names the operator that forbids it."""

    name: str
    size: int
    members: list[Member]
    prunable: bool = True
    reason: str = ""
    components: Array = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    def pin(self, reason: str) -> None:
        """Forbids removal."""
        self.prunable, self.reason = False, reason

    def __repr__(self) -> str:
        state = "" if self.prunable else f", pinned: {self.reason}"
        return f"ChannelGroup({self.name!r}, {self.size} channels, {len(self.members)} members{state})"


def solve(atoms: Atoms, parameters: Sequence[str]) -> tuple[list[ChannelGroup], Array, dict[int, str]]:
    """Channel groups, the class of every atom, and the reasons of the pinned classes.

    `parameters` are the names in the network's order; groups are sorted by it. Only classes with a place in a weight ("out" or "in")
    become groups.
    """
    component = atoms.components()
    reasons = atoms.reasons(component)
    contracted, produced = atoms.read(), atoms.flags(atoms.produced)
    order = {name: position for position, name in enumerate(parameters)}
    owners = sorted(atoms.owners, key=lambda owner: (order.get(owner.name, len(order)), owner.dim))
    number = int(component.max()) + 1 if len(component) else 0

    live = np.zeros(number, dtype=bool)
    live[component[contracted | produced]] = True
    rng = np.random.default_rng(0)
    signature = np.zeros(number, dtype=np.uint64)
    for owner in owners:
        counts = np.bincount(component[owner.base:owner.base + owner.size], minlength=0).astype(np.uint64)
        signature[:len(counts)] += counts * rng.integers(1, 2**63, dtype=np.uint64)
    pinned = np.zeros(number, dtype=np.uint64)
    texts = {text: position + 1 for position, text in enumerate(dict.fromkeys(reasons.values()))}
    for key, text in reasons.items():
        pinned[key] = texts[text]
    signature += pinned * rng.integers(1, 2**63, dtype=np.uint64)

    group_of = np.full(number, -1, dtype=np.int64)
    alive = np.flatnonzero(live)
    if len(alive):
        _, inverse = np.unique(signature[alive], return_inverse=True)
        group_of[alive] = inverse
    rank = np.zeros(number, dtype=np.int64)
    drafts: dict[int, tuple[Array, list[Member]]] = {}
    for owner in owners:
        own = component[owner.base:owner.base + owner.size]
        groups = group_of[own]
        for group in dict.fromkeys(groups[groups >= 0].tolist()):
            here = np.flatnonzero(groups == group)
            if group not in drafts:
                _, first = np.unique(own[here], return_index=True)
                classes = own[here][np.sort(first)]
                rank[classes] = np.arange(len(classes))
                drafts[group] = classes, []
            classes, members = drafts[group]
            indices = here[np.argsort(rank[own[here]], kind="stable")].reshape(len(classes), -1)
            span = slice(owner.base, owner.base + owner.size)
            role = IN if contracted[span].any() else OUT if produced[span].any() else PARAM
            members.append(Member(owner.name, owner.dim, torch.from_numpy(indices), role))  # type: ignore[arg-type]
    return _finish(list(drafts.values()), reasons), component, reasons


def _finish(drafts: list[tuple[Array, list[Member]]], reasons: dict[int, str]) -> list[ChannelGroup]:
    groups: list[ChannelGroup] = []
    used: set[str] = set()
    for classes, members in drafts:
        producer = next((m for m in members if m.role == OUT), members[0])
        name, number = producer.parameter, 1
        while name in used:
            number += 1
            name = f"{producer.parameter}#{number}"
        used.add(name)
        group = ChannelGroup(name, len(classes), members, components=classes)
        if int(classes[0]) in reasons:
            group.pin(reasons[int(classes[0])])
        elif not any(member.role == OUT for member in members):
            group.pin("no layer produces these channels")
        elif len(classes) == 1:
            group.pin("only one channel could be removed, and one must stay")
        groups.append(group)
    return groups
