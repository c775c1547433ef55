"""Which processes measure statistics together: all of the default process group, or, inside `local`, this one alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed

_LOCAL = ContextVar("local", default=False)


@contextmanager
def local() -> Iterator[None]:
    """Statistics measured inside are those of this process's images, and no other process is waited for.

    For work that one process of several does while the others wait for its result.
    """
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)


def world() -> int:
    """Number of processes that share the data."""
    if _LOCAL.get() or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator (seed 0 if None); with several processes one for this process alone, seeded from it and from the rank.

    Processes come with equal seeds and different images, whose draws would otherwise repeat each other.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if world() == 1:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed + distributed.get_rank())


def sum_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by that of the first process, in place."""
    if world() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)
