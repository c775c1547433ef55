"""Several processes that train one network, each on its part of every batch.

The processes are started by torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; gloo on the CPU, NCCL on GPUs.
Sums go over one flat buffer per data type. Every collective has a timeout, so that a lost or hanging peer ends in `RunError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from compress.errors import RunError, UserError

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Dist:
    """One process among `world_size`; the default is a process alone, for which every method does nothing."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Only this process writes files and logs."""
        return self.rank == 0

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place."""
        self._each_flat(tensors, lambda flat: dist.all_reduce(flat, op=dist.ReduceOp.SUM))

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by that of rank 0, in place. As bytes: neither gloo nor NCCL knows the 16-bit integers of packed weights."""
        self._each_flat(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), src=0))

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum_([torch.zeros(1, device=self.device)])

    def share_bytes(self, data: bytes | None) -> bytes:
        """The bytes of rank 0, on every process (`data` is ignored on the others)."""
        if self.world_size == 1:
            return data or b""
        payload = bytearray(data or b"") if self.is_main else bytearray()
        size = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        self.broadcast_([size])
        if int(size) == 0:
            return b""
        payload = payload or bytearray(int(size))
        buffer = torch.frombuffer(payload, dtype=torch.uint8).to(self.device)
        self.broadcast_([buffer])
        return buffer.cpu().numpy().tobytes()

    def _each_flat(self, tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
        if self.world_size == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [tensor for tensor in tensors if tensor.dtype == kind]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            try:
                collective(flat)
            except RuntimeError as error:
                reason = str(error).splitlines()[0].split(". ")[0]
                raise RunError(f"Process {self.rank} of {self.world_size} lost a peer or waited for one too long ({reason}).") from error
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))


@contextmanager
def connect(device: torch.device | str, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Dist]:
    """Join the processes that torchrun started; without torchrun, a process alone. Disconnects at the end.

    `device` is that of the configuration; with several processes a plain `cuda` becomes the GPU of the local rank, see `Dist.device`.
    Raises `UserError` where the environment is incomplete, `RunError` where the others cannot be reached in time.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Dist(device=device)
        return
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is set, but RANK or LOCAL_RANK is no number ({error}); start with torchrun.") from error
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Dist(0, 1, local_rank, device)
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"Process {rank} of {world_size} could not reach the others ({str(error).splitlines()[0]}).") from error
    try:
        yield Dist(rank, world_size, local_rank, device)
    finally:
        dist.destroy_process_group()
