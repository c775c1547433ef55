"""A stand-in for the parts of torch.cuda that `kernels.timing` uses; it writes down what happens, in order."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch


class Graph:
    """Remembers the calls of its capture through `body`, and counts replays."""

    def __init__(self, log: list) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append(("replay", self))


class Recorder:
    """What was done: streams made current, captures, pools given back, and replays."""

    def __init__(self) -> None:
        self.log: list = []
        self.stream = "default"
        self.pools = 0
        self.capturing = False
        self.broken = False
        self.free = 2**40

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        """As torch.cuda.graph: where ending the capture raises, its stream stays the current one and the pool stays open."""
        self.stream, before, self.capturing = stream, self.stream, True
        try:
            yield
        finally:
            self.capturing = False
            if self.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream = before

    def pool(self):
        self.pools += 1
        return (0, self.pools)

    def install(self, monkeypatch, cache: int = 50 * 2**20) -> Recorder:
        made = iter(range(1, 1000))
        fakes = {
            "Stream": lambda: SimpleNamespace(name=next(made), wait_stream=lambda other: None, synchronize=lambda: None),
            "current_stream": lambda: self.stream, "set_stream": lambda stream: setattr(self, "stream", stream), "stream": self.on_stream,
            "graph": self.graph, "CUDAGraph": lambda: Graph(self.log), "graph_pool_handle": self.pool, "current_device": lambda: 0,
            "device": lambda index: contextlib.nullcontext(), "_sleep": lambda cycles: self.log.append("sleep"),
            "synchronize": lambda: None, "mem_get_info": lambda device: (self.free, 2**40),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=cache),
            "Event": lambda enable_timing: SimpleNamespace(record=lambda: self.log.append("event"), synchronize=lambda: None,
                                                           elapsed_time=lambda other: 2.0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: self.log.append((name, pool)), raising=False)
        return self
