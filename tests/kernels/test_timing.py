"""Oracle: the order of calls and what stays alive, written down by a stand-in for torch.cuda."""

import gc
import weakref

import pytest
import torch
from torch import nn

from kernels import measure, timing

from .fake_cuda import Recorder


@pytest.fixture
def cuda(monkeypatch):
    return Recorder().install(monkeypatch)


def test_copies_exceed_three_times_the_cache(cuda):
    """50 MiB of cache: 150 copies of 1 MiB, one of 1 GiB, no more than MOST_COPIES of anything and than half the free memory holds."""
    device = torch.device("cpu")
    copies = [timing.copies_needed(size, device) for size in (2**20, 9 * 2**20, 2**30, 1, 0)]
    assert copies == [150, 17, 1, timing.MOST_COPIES, timing.MOST_COPIES]
    cuda.free = 20 * 2**20
    assert timing.copies_needed(2**20, device) == 10 and timing.copies_needed(2**30, device) == 1


def test_more_copies_where_they_are_asked_for(cuda):
    """150 MiB of 32 KiB are 4800 copies, which 512 would leave inside the cache."""
    assert timing.copies_needed(2**15, torch.device("cpu"), most=8192) == 4800


def test_what_fits_into_the_cache_is_warm(cuda):
    """50 MiB of cache: as many bytes are warm, three times as many are cold, and between them is neither."""
    mib = 2**20
    assert [timing.temperature(size, torch.device("cpu")) for size in (50 * mib, 50 * mib + 1, 150 * mib - 1, 150 * mib)] == [
        "warm", "partly warm", "partly warm", "cold"]


def test_a_graph_goes_round_all_copies(cuda):
    """Every copy is called once to warm up, then captured at least once; a short list fills the graph."""
    for count, launches in ((3, timing.LAUNCHES), (33, 33)):
        done = []
        captured = timing.capture([lambda number=number: done.append((cuda.capturing, number)) for number in range(count)])
        assert captured.launches == launches
        assert done == [(False, n) for n in range(count)] + [(True, n % count) for n in range(launches)]
    assert timing.capture([lambda: None], launches=3).launches == 3


def test_a_graph_keeps_its_tensors(cuda):
    tensors = [torch.ones(3) for _ in range(4)]
    watched = [weakref.ref(t) for t in tensors]
    captured = timing.capture([lambda tensor=tensor: tensor for tensor in tensors])
    del tensors
    gc.collect()
    assert all(reference() is not None for reference in watched) and captured.output is watched[(timing.LAUNCHES - 1) % 4]()


def test_replays_take_turns_and_hide_the_launch(cuda):
    graphs = [timing.capture([lambda: None], launches=launches) for launches in (1, 2)]
    first, second = timing.replay(graphs, rounds=2)
    assert [entry[1] for entry in cuda.log if entry[0] == "replay"] == [g.graph for g in graphs] * (2 + timing.WARM_ROUNDS)
    assert cuda.log[:4] == ["sleep", "event", ("replay", graphs[0].graph), "event"]
    assert first == timing.Timing(2000.0, 2000.0, 2000.0, 2) and second.median == 1000.0


def test_a_longer_graph_gets_a_longer_head_start(cuda, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    timing.replay([timing.capture([lambda: None], launches=launches) for launches in (20, 512, 513, 4096)], rounds=1)
    assert waits[-4:] == [timing.HEAD_START * times for times in (1, 1, 2, 8)]


def test_a_broken_capture_leaves_the_stream_and_the_pool_as_they_were(cuda):
    def call():
        if cuda.capturing:
            cuda.broken = True
            raise ValueError("not permitted while capturing")

    with pytest.raises(RuntimeError, match="during capture"):
        timing.capture([call])
    assert cuda.stream == "default"
    assert cuda.log[:2] == [("_cuda_endAllocateToPool", (0, 1)), ("_cuda_releasePool", (0, 1))]


def test_an_exception_outside_torch_passes_through(cuda):
    def call():
        if cuda.capturing:
            raise ValueError("no such configuration")

    with pytest.raises(ValueError, match="no such configuration"):
        timing.capture([call])
    assert cuda.stream == "default"


def test_all_copies_of_all_forms_live_while_they_are_timed(cuda, monkeypatch):
    """Three forms of a layer: each graph's copies are alive when the graphs are replayed, not only those of the last."""
    monkeypatch.setattr(timing, "copies_needed", lambda size, device: 4)
    watched, alive = [], []

    class Form(nn.Linear):
        def __deepcopy__(self, memo):
            copied = Form(2, 2)
            watched.append(weakref.ref(copied))
            return copied

    replay = timing.replay
    monkeypatch.setattr(timing, "replay", lambda graphs: (gc.collect(), alive.append(sum(w() is not None for w in watched)), replay(graphs))[2])
    measured = measure.Measured()
    measure._time_cuda({name: Form(2, 2) for name in ("dense", "a", "b")}, torch.ones(1, 2), measured)
    assert alive == [9, 9] and set(measured.times) == {"dense", "a", "b"}


def test_a_form_that_cannot_be_captured_is_named(cuda):
    class Fails(nn.Linear):
        def forward(self, x):
            if cuda.capturing:
                raise NotImplementedError("synchronises\nmore")
            return super().forward(x)

    measured = measure.Measured()
    measure._time_cuda({"dense": nn.Linear(2, 2), "a": Fails(2, 2)}, torch.ones(1, 2), measured)
    assert set(measured.times) == {"dense"} and measured.faults == {"a": "synchronises"}
    measured = measure.Measured()
    measure._time_cuda({"dense": Fails(2, 2), "a": nn.Linear(2, 2)}, torch.ones(1, 2), measured)
    assert measured.times == {} and measured.faults == {"dense": "synchronises"}


def test_networks_are_compared_as_graphs_where_they_can_be(cuda, monkeypatch):
    class OnGpu(nn.Linear):
        """A network whose parameters claim to be on a GPU."""

        def parameters(self, recurse=True):
            yield type("Parameter", (), {"is_cuda": True, "get_device": lambda self: -1})()

    pair = OnGpu(2, 2), OnGpu(2, 2)
    assert list(measure.network_times(pair, (torch.ones(1, 2),), 0.0)) == [(pytest.approx(2000 / 3), pytest.approx(2000 / 3),
                                                                            "measured as CUDA graphs")] * 2

    class Dynamic(OnGpu):
        def forward(self, x):
            if cuda.capturing:
                raise RuntimeError("data-dependent")
            return super().forward(x)

    monkeypatch.setattr(timing, "on_cpu", lambda calls, *rest, **more: [timing.Timing(5.0, 5.0, 5.0, 1) for call in calls if call() is not None])
    found = list(measure.network_times((pair[0], Dynamic(2, 2)), (torch.ones(1, 2),), 0.0))
    assert found == [(5.0, 5.0, "measured eagerly, because it cannot be captured in a CUDA graph (data-dependent)")] * 2
    plain = next(measure.network_times((nn.Linear(2, 2), nn.Linear(2, 2)), (torch.ones(1, 2),), 0.0))
    assert plain == (5.0, 5.0, "")
