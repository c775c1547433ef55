"""Oracle: the dense product with the weights as they are now; the cuSPARSELt calls are replaced by plain torch, because they need a GPU."""

import pytest
import torch

from kernels import formats
from kernels.two_four import op

from .masks import masked


@pytest.fixture
def calls(monkeypatch):
    """`compress`, `search` and `multiply` calls of a stand-in for cuSPARSELt."""
    seen = {"compress": 0, "search": 0, "multiply": 0}

    def compress(dense):
        seen["compress"] += 1
        assert int((dense.view(dense.shape[0], -1, 4) != 0).sum(-1).max()) <= 2, "not a 2:4 matrix"
        return dense

    def search(compressed, x):
        seen["search"] += 1
        return 7

    def multiply(compressed, x, alg_id):
        seen["multiply"] += 1
        assert alg_id == 7 and x.shape[1] % 8 == 0
        return compressed @ x

    for name, function in (("_cslt_compress", compress), ("_cslt_sparse_mm_search", search), ("_cslt_sparse_mm", multiply)):
        monkeypatch.setattr(torch, name, function, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def test_compresses_once_and_again_after_an_update(calls):
    weight = masked(32, 64, 0.5, "random", torch.Generator().manual_seed(1))
    packed = formats.pack("two_four", weight)
    s = op._dense_s(packed.values, packed.index, 32, 64)
    for batch in (3, 8, 3):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(op._sparse_tensor_cores(x, packed.values, packed.index, 32, 64), x @ s.t())
    assert calls == {"compress": 1, "search": 1, "multiply": 3}
    with torch.no_grad():
        packed.values.mul_(2)
    x = torch.randn(8, 64)
    torch.testing.assert_close(op._sparse_tensor_cores(x, packed.values, packed.index, 32, 64), x @ (2 * s).t())
    assert calls["compress"] == 2
