"""Oracle: the dense product with the weights as they are now; the cuSPARSELt calls are replaced by plain torch, because they need a GPU."""

import pytest
import torch

from kernels import formats
from kernels.two_four import op

from .masks import masked


def product(x, values, packed):
    return op._sparse_tensor_cores(x, values, packed.index, packed.rows, packed.columns)


def example(seed=1):
    packed = formats.pack("two_four", masked(32, 64, 0.5, "random", torch.Generator().manual_seed(seed)))
    return packed, op._dense_s(packed.values, packed.index, 32, 64)


@pytest.fixture
def calls(monkeypatch):
    """`compress`, `search` and `multiply` calls of a stand-in for cuSPARSELt."""
    seen = {"compress": 0, "search": 0, "multiply": 0}

    def compress(dense):
        seen["compress"] += 1
        assert int((dense.view(dense.shape[0], -1, 4) != 0).sum(-1).max()) <= 2, "not a 2:4 matrix"
        return dense.clone()

    def search(compressed, x):
        seen["search"] += 1
        return 7

    def multiply(compressed, x, alg_id):
        seen["multiply"] += 1
        assert x.data_ptr() % 16 == 0, "cuSPARSELt reads 16 bytes at a time"
        assert alg_id == (0 if torch.cuda.is_current_stream_capturing() else 7) and x.shape[1] % 8 == 0
        if not x.is_contiguous():  # the library takes any such matrix for the transpose of a contiguous one
            x = x.as_strided(x.shape, (1, x.shape[0]))
        return compressed.to(x.dtype) @ x

    for name, function in (("_cslt_compress", compress), ("_cslt_sparse_mm_search", search), ("_cslt_sparse_mm", multiply)):
        monkeypatch.setattr(torch, name, function, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def test_compresses_once_and_again_after_an_update(calls):
    packed, s = example()
    for batch in (3, 8, 3):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(product(x, packed.values, packed), x @ s.t())
    assert calls == {"compress": 1, "search": 1, "multiply": 3}
    with torch.no_grad():
        packed.values.mul_(2)
    x = torch.randn(8, 64)
    torch.testing.assert_close(product(x, packed.values, packed), x @ (2 * s).t())
    assert calls["compress"] == 2


def test_input_with_gaps(calls):
    packed, s = example()
    for x in (torch.randn(8, 128)[:, ::2], torch.randn(64, 8).t(), torch.randn(16, 64)[::2], torch.randn(8 * 64 + 1)[1:].view(8, 64)):
        torch.testing.assert_close(product(x, packed.values, packed), x @ s.t())


def test_new_data_under_the_same_parameter(calls):
    packed, s = example()
    values, x = torch.nn.Parameter(packed.values.clone()), torch.randn(8, 64)
    product(x, values, packed)
    version = values._version
    values.data = 3 * values.data
    assert values._version == version
    torch.testing.assert_close(product(x, values, packed), 3 * x @ s.t())
    assert calls["compress"] == 2


def test_inference_tensors_are_compressed_every_time(calls):
    packed, s = example()
    x = torch.randn(8, 64)
    with torch.inference_mode():
        values = packed.values.clone()
        torch.testing.assert_close(product(x, values, packed), x @ s.t())
        values.mul_(2)
        torch.testing.assert_close(product(x, values, packed), 2 * x @ s.t())
    assert calls == {"compress": 2, "search": 1, "multiply": 2}


def test_nothing_that_was_made_while_recording_a_graph_is_kept(calls, monkeypatch):
    packed, s = example()
    x = torch.randn(8, 64)
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        torch.testing.assert_close(product(x, packed.values, packed), x @ s.t())
    assert calls == {"compress": 1, "search": 0, "multiply": 1}
    torch.testing.assert_close(product(x, packed.values, packed), x @ s.t())
    assert calls == {"compress": 2, "search": 1, "multiply": 2}


@pytest.mark.parametrize("built, capability, expected", [(True, (9, 0), True), (True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)])
def test_the_library_is_used_where_it_is(built, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    op._has_library.cache_clear()
    assert op._has_library(torch.device("cuda", 0)) == expected
    monkeypatch.setattr(torch.backends, "cusparselt", None)
    op._has_library.cache_clear()
    assert not op._has_library(torch.device("cuda", 0))
    op._has_library.cache_clear()
