"""Oracle: a stand-in for torch.cuda that gives every call a known time, and stand-ins for rivals that need a GPU."""

import types

import pytest
import torch
from torch import nn

from benchmarks import _own, _rivals, _sides, _timing
from kernels import SparseConv2d, SparseLinear, timing

from .fake_blksprs import Blksprs, blocks_layer
from .fake_cuda import Recorder


@pytest.fixture
def cuda(monkeypatch):
    return Recorder().install(monkeypatch)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def sides_taking(monkeypatch, times: dict[str, float]) -> dict[str, _sides.Side]:
    """Sides that all give ones and take so many microseconds."""
    known = {}

    def timed(calls, rounds=30):
        return [timing.Timing(known[id(alternatives[0])], 0.0, 0.0, rounds) for alternatives in calls]

    monkeypatch.setattr(timing, "on_cuda", timed)
    found = {}
    for name, microseconds in times.items():
        call = lambda: torch.ones(2)  # noqa: E731
        known[id(call)] = microseconds
        found[name] = _sides.Side([call], 1)
    return found


ONES = torch.ones(2, dtype=torch.float64)


def test_the_fastest_setting_that_is_right_is_taken(monkeypatch):
    sides = sides_taking(monkeypatch, {"a": 3.0, "b": 2.0, "wrong": 1.0, "fails": 1.0, "c": 4.0})
    sides["wrong"].calls[0] = lambda: torch.full((2,), 1.01)
    sides["fails"].calls[0] = lambda: [][0]
    side = _sides.fastest(sides, ONES, 60.0)
    assert side.calls is sides["b"].calls and side.facts["settings"] == "b" and side.facts["settings_offered"] == 5
    assert side.facts["tuning_us"] == {"a": 3.0, "b": 2.0, "c": 4.0}
    assert side.facts["faults"] == {"wrong": "wrong by 1.0e-02", "fails": "IndexError: list index out of range"}
    with pytest.raises(RuntimeError, match="none of 2 settings ran: wrong: wrong by 1.0e-02; fails: IndexError"):
        _sides.fastest({name: sides[name] for name in ("wrong", "fails")}, ONES, 60.0)


def test_tuning_ends_in_time(monkeypatch):
    """Every setting takes 10 seconds: of 25 seconds, three begin; of none, the first."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(_sides.time, "monotonic", lambda: float(next(clock)))
    sides = sides_taking(monkeypatch, {name: float(ord(name)) for name in "fedcba"})
    assert list(_sides.fastest(sides, ONES, 25.0).facts["tuning_us"]) == ["f", "e", "d"]
    assert list(_sides.fastest(sides, ONES, 0.0).facts["tuning_us"]) == ["f"]


@pytest.mark.parametrize("format, options", [("run16", {}), ("vector_block", {"height": 64}), ("vector_block", {"height": 128}),
                                             ("sparse_conv", {"height": 64}), ("sparse_conv", {"height": 128})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_settings_reach_the_kernel_under_their_names(generator, format, options, dtype):
    """A form with launch settings has the options that packing with these settings gives; few enough to be tried on every case."""
    weight = torch.randn(512, 2048, generator=generator, dtype=torch.float32).to(dtype)
    layer = (nn.Conv2d(2048, 512, 1, bias=False) if format == "sparse_conv" else nn.Linear(2048, 512, bias=False)).to(dtype)
    layer.weight.data.copy_(weight.view_as(layer.weight))
    kind = SparseConv2d if format == "sparse_conv" else SparseLinear
    form = object.__new__(_own.Form)
    form.packed = kind.from_dense(layer, format=format, **options).packed
    form.modules = [lambda x: seen.append(tuple(form.modules[0].options))]
    seen: list[tuple] = []
    found = list(_own.launch_settings(form.packed, 512))
    assert found[0] == {} and 4 <= len(found) <= 11 and len({tuple(s.items()) for s in found}) == len(found)
    assert {s["splits"] for s in found[1:]} >= {1, 2}
    for settings in found:
        form._calls(None, settings)[0]()
        assert seen.pop() == kind.from_dense(layer, format=format, **options, **settings).packed.options
        height, tile = options.get("height", 0), settings.get("width", settings.get("pixels", 0))
        assert height * tile <= 128 * 64 and (dtype == torch.bfloat16 or tile <= 64)


def test_more_columns_than_fill_a_gpu_are_not_split(generator):
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    packed = SparseConv2d.from_dense(layer, format="sparse_conv").packed
    assert {s.get("splits", 1) for s in _own.launch_settings(packed, 128 * 56 * 56)} == {1}
    assert max(s.get("splits", 1) for s in _own.launch_settings(packed, 56 * 56)) > 1


def test_a_form_is_measured_with_its_fastest_settings(cuda, generator, monkeypatch):
    """Sixteen warps' worth of shares is made the fastest: the side runs with it, and the row says so."""
    layer = nn.Linear(512, 64, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(64, 512, generator=generator))
    x = torch.randn(2, 512, generator=generator)
    form = _own.Form(layer, "run16")
    used = []
    for module in form.modules:
        module.register_forward_hook(lambda m, given, y: used.append(tuple(m.options)))

    def timed(calls, rounds=30):
        calls[0][0]()
        return [timing.Timing(1.0 if used[-1][1:] == (8, 2) else 2.0, 0.0, 0.0, 5)]

    monkeypatch.setattr(timing, "on_cuda", timed)
    side = form.side(x, x.double() @ layer.weight.double().t(), 60.0)
    assert side.facts["settings"] == "warps 8, splits 2" and side.facts["tuning_us"]["own choice"] == 2.0
    side.calls[0]()
    assert used[-1][1:] == (8, 2)
    untuned = form.side(x, x.double() @ layer.weight.double().t(), 0.0)
    untuned.calls[0]()
    assert used[-1][1:] == (0, 0) and untuned.facts == {}


def test_blksprs_can_be_captured(cuda, generator, monkeypatch):
    """Its products wait for the GPU unless every copy brings a cache of its own that was filled before, and validation is off."""
    rival = Blksprs(cuda).install(monkeypatch)
    monkeypatch.setattr(timing, "copies_needed", lambda size, device, most: 3)
    layer = blocks_layer(generator)
    x = torch.randn(8, 128, generator=generator)
    with torch.no_grad():
        for _ in range(2):  # a second case finds what the first one left
            validated = rival.validated
            rows = _sides.compare({"dense": lambda: _rivals.dense(layer, x), "blksprs": lambda: _rivals.blksprs_blocks(layer, x)}, x,
                                  x.double() @ layer.weight.double().t())
            assert "us" in rows["blksprs"], rows["blksprs"]
            assert rival.validated > validated and not any(rival.tuned.values())
    assert len({id(cache) for cache in rival.caches[-timing.LAUNCHES:]}) == 3
    assert rows["blksprs"]["bytes"] == 2 * 64 * 64 * 4 + 6 * 8 + 8 * (128 + 192) * 4


class Semi:
    """torch's 2:4 tensor as far as the benchmark uses it."""

    _DTYPE_SHAPE_CONSTRAINTS = {torch.bfloat16: types.SimpleNamespace(dense_min_rows=8)}

    def __init__(self, dense):
        self.packed, self.alg_id_cusparselt = dense, 0


@pytest.fixture
def semi(cuda, monkeypatch):
    """torch 2:4 on the CPU; `searched` are the shapes that its search saw, and `off` is added by algorithm 2."""
    state = types.SimpleNamespace(searched=[], off=0.0)
    linear = nn.functional.linear

    def search(packed, x, transpose_result):
        state.searched.append(tuple(x.shape))
        return 2 if transpose_result else 1

    def product(x, weight, bias=None):
        if not isinstance(weight, Semi):
            return linear(x, weight, bias)
        return linear(x, weight.packed) + (state.off if weight.alg_id_cusparselt == 2 else 0.0)

    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUSPARSELT", Semi)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", Semi)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(nn.functional, "linear", product)
    return state


def two_four(generator, columns: int) -> tuple[dict, nn.Linear, torch.Tensor]:
    layer = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(torch.randn(64, 128, generator=generator))
    x = torch.randn(columns, 128, generator=generator).to(torch.bfloat16)
    sides = {"dense": lambda: _rivals.dense(layer, x), "rival": lambda: _rivals.torch_two_four(layer, x, 60.0)}
    return _sides.compare(sides, x, x.double() @ layer.weight.double().t()), layer, x


@pytest.mark.parametrize("columns, padded", [(1, 8), (8, 8), (9, 16), (64, 64)])
def test_two_four_is_searched_for_the_shape_that_torch_multiplies(semi, generator, columns, padded):
    rows, _, _ = two_four(generator, columns)
    assert semi.searched == [(128, padded)] * 2 and "us" in rows["rival"]
    assert set(rows["rival"]["tuning_us"]) == {"algorithm 0", "algorithm 1", "algorithm 2"}


@pytest.mark.parametrize("off", [0.5, float("nan")])
def test_two_four_is_held_against_its_own_product(semi, generator, off):
    """An algorithm that is wrong is not taken; where every one is, the rival shows no speed."""
    semi.off = off
    rows, _, _ = two_four(generator, 8)
    assert set(rows["rival"]["tuning_us"]) == {"algorithm 0", "algorithm 1"} and "wrong by" in rows["rival"]["faults"]["algorithm 2"]
    Semi.packed = property(lambda self: self._packed + off, lambda self, dense: setattr(self, "_packed", dense))
    try:
        rows, _, _ = two_four(generator, 8)
    finally:
        del Semi.packed
    assert "us" not in rows["rival"] and "wrong by" in rows["rival"]["failed"]


def test_csr_is_offered_with_32_bit_indices(cuda, generator, monkeypatch):
    """64-bit indices cost 4 bytes more per weight; the fastest of both is the rival, and where one is not supported the other."""
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(32, 64, generator=generator).relu())
    kept, x = int((layer.weight != 0).sum()), torch.randn(1, 64, generator=generator)
    expected = x.double() @ layer.weight.double().t()
    taken = []

    def timed(calls, rounds=30):
        weight = calls[0][0].args[0]
        taken.append(weight.col_indices().dtype)
        return [timing.Timing(float(weight.col_indices().element_size()), 0.0, 0.0, 5)]

    monkeypatch.setattr(timing, "on_cuda", timed)
    side = _rivals.torch_csr(layer, x, expected, 60.0)
    assert side.facts["settings"].startswith("32-bit indices") and side.weight_bytes == kept * 8 + 33 * 4
    assert taken == [torch.int32] * 3 + [torch.int64] * 3

    def wide_only(calls, rounds=30):
        if calls[0][0].args[0].col_indices().dtype == torch.int32:
            raise RuntimeError("not implemented for 'Int'")
        return timed(calls)

    monkeypatch.setattr(timing, "on_cuda", wide_only)
    side = _rivals.torch_csr(layer, x, expected, 60.0)
    assert side.facts["settings"].startswith("64-bit indices") and side.weight_bytes == kept * 12 + 33 * 8
    assert all("not implemented" in fault for fault in side.facts["faults"].values()) and len(side.facts["faults"]) == 3


def test_rows_say_where_the_weights_came_from(cuda, monkeypatch):
    """50 MiB of cache: 8192 copies of 4 KiB are 32 MiB, of 8 KiB 64 MiB, of 32 KiB more than 150 MiB; x and y count, too."""
    def rows(weight_bytes: int, columns: int) -> dict:
        x, y = torch.zeros(columns, 8), torch.zeros(columns, 4)
        side = _sides.Side(_sides.copies(lambda: lambda: y, weight_bytes, x.device), weight_bytes)
        # Only the first copy is called, as if the graph were there already.
        monkeypatch.setattr(timing, "capture", lambda calls: None)
        monkeypatch.setattr(timing, "replay", lambda graphs: [timing.Timing(1.0, 1.0, 1.0, 1)])
        return _sides.compare({"dense": lambda: side}, x, y.double())["dense"]

    assert [rows(size, 1)["cache"] for size in (2**12, 2**13, 2**15)] == ["warm", "partly warm", "cold"]
    assert [rows(size, 1)["copies"] for size in (2**12, 2**15)] == [8192, 4800]
    assert rows(2**12, 2**20)["cache"] == "partly warm"


def test_the_table_shows_settings_and_warm_weights():
    row = {"kind": "conv", "name": "a", "columns": 1, "pattern": "panels", "sparsity": 0.5}
    times = {"dense": {"us": 4.0, "ratio": 1.0, "p10": 4.0, "p90": 4.0, "cache": "cold"},
             "x": {"us": 2.0, "ratio": 2.0, "p10": 2.0, "p90": 2.0, "cache": "warm", "settings": "pixels 64, splits 2"}}
    table = _timing.table({"environment": {"device": "d"}, "rows": [{**row, "times": times}]})
    assert "| x | 2.00 (pixels 64, splits 2; warm) |" in table and "| dense | 4 us |" in table and "a cell says warm" in table
    assert _timing.line("case", times) == "case: dense 4 us, x 2.00 (2.00..2.00; pixels 64, splits 2; warm)"
    times["dense"]["cache"] = "warm"
    assert "| dense | 4 us (warm) |" in _timing.table({"environment": {"device": "d"}, "rows": [{**row, "times": times}]})
    plain = {name: {k: v for k, v in side.items() if k not in ("cache", "settings")} for name, side in times.items()}
    assert "warm" not in _timing.table({"environment": {"device": "d"}, "rows": [{**row, "times": plain}]})
