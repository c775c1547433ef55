"""A side of a kernel benchmark: one product on several copies of its weight. Building, tuning and comparing sides.

Whoever takes part is tuned alike: every setting is captured in a graph of its own on up to 512 copies, replayed a few times, and the fastest of
those that compute the right thing is measured again with the others. Tuning ends after a given number of seconds, the setting in progress
excepted; a setting that was not reached is not in the record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import _timing
from benchmarks._worker import failure_line
from kernels import timing

MOST_COPIES = 8192  # at 3 microseconds a graph of so many calls takes 25 milliseconds
TUNING_ROUNDS = 5
OWN_CHOICE = "own choice"
Copy = TypeVar("Copy")


@dataclass(frozen=True)
class Side:
    """The same call on several copies of a weight; bytes that one call reads of it; what it should give where that is not the masked product;
    facts for its row, such as the settings."""

    calls: list[Callable[[], Tensor]]
    weight_bytes: int
    expected: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def copies(make: Callable[[], Copy], bytes_each: int, device: torch.device) -> list[Copy]:
    """As many copies of a weight as make its rotation cold, as far as memory and MOST_COPIES allow; `make` builds one."""
    return [make() for _ in range(timing.copies_needed(bytes_each, device, most=MOST_COPIES))]


def fastest(candidates: dict[str, Side], expected: Tensor, seconds: float) -> Side:
    """The fastest of one side's settings, with the microseconds of all that were tried and why others cannot be used.

    RuntimeError: none of them gives `expected`.
    """
    times: dict[str, float] = {}
    faults: dict[str, str] = {}
    end = time.monotonic() + seconds
    for name, side in candidates.items():
        if times and time.monotonic() >= end:
            break
        try:
            fault = _timing.fault(side.calls[0](), expected if side.expected is None else side.expected)
            if fault is None:
                (taken,) = timing.on_cuda([side.calls[: timing.MOST_COPIES]], rounds=TUNING_ROUNDS)
                times[name] = taken.median
        except Exception as failure:
            # A setting may need more of the GPU than there is, or a type that the library does not have; the others can do without it.
            fault = failure_line(failure)
        if fault:
            faults[name] = fault
    if not times:
        raise RuntimeError(f"none of {len(faults)} settings ran: " + "; ".join(f"{name}: {fault}" for name, fault in faults.items()))
    best = min(times, key=times.__getitem__)
    facts = {"settings": best, "tuning_us": times, "settings_offered": len(candidates)} | ({"faults": faults} if faults else {})
    return replace(candidates[best], facts=candidates[best].facts | facts)


def compare(sides: dict[str, Callable[[], Side]], x: Tensor, expected: Tensor) -> dict[str, dict]:
    """Times of the sides (one that cannot be built has failed), with the bytes that each reads and writes, its facts, and whether its weights
    came from memory ("cache"): between two uses of one copy lie all others, and x and y."""
    built: dict[str, Side] = {}
    failures: dict[str, dict] = {}
    for name, build in sides.items():
        try:
            built[name] = build()
        except Exception as failure:
            failures[name] = {"failed": failure_line(failure)}
    others = {name: side.expected for name, side in built.items() if side.expected is not None}
    result = _timing.compare_cuda({name: side.calls for name, side in built.items()}, expected, others)
    around = size([x]) + expected.numel() * x.element_size()
    for name, times in result.items():
        side = built[name]
        times |= side.facts
        if "us" in times:
            rotated = len(side.calls) * side.weight_bytes + around
            times |= {"bytes": side.weight_bytes + around, "copies": len(side.calls), "cache": timing.temperature(rotated, x.device)}
    return result | failures


def describe(times: dict[str, dict], copy_gb_s: float) -> None:
    """Adds GB/s and the share of the copy bandwidth to every side."""
    for side in times.values():
        if "bytes" in side:
            side["gb_s"] = side["bytes"] / side["us"] / 1e3
            side["share_of_copy"] = side["gb_s"] / copy_gb_s
