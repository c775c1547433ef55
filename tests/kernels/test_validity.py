"""Oracle: what the packers make is valid; a stored weight with any integer moved out of its bounds is refused, or decodes inside the layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels import SparseConv2d, SparseLinear
from kernels.formats import FORMATS, pack, unpack
from kernels.validity import fault

from .masks import PATTERNS, masked

DEFAULTS = {"sparse_conv": {"kernel": (1, 1)}}


def packed(name, rows=33, columns=48, sparsity=0.7, pattern="random"):
    return pack(name, masked(rows, columns, sparsity, pattern, torch.Generator().manual_seed(rows)), **DEFAULTS.get(name, {}))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pattern", sorted(set(PATTERNS)))
def test_what_a_packer_makes_is_valid(name, pattern):
    for rows, columns in [(33, 48), (1, 4), (64, 320)]:
        for sparsity in (0.0, 0.9, 1.0):
            assert fault(packed(name, rows, columns, sparsity, pattern)) is None


def test_a_convolution_with_a_kernel_is_valid():
    weight = masked(32, 16 * 9, 0.8, "random", torch.Generator().manual_seed(1))
    assert fault(pack("sparse_conv", weight, kernel=(3, 3))) is None
    assert fault(pack("run16", masked(8, 70000, 0.999, "far", torch.Generator().manual_seed(1)))) is None


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damaged_integer_is_refused_or_harmless(name, data):
    damaged = packed(name)
    tensor = data.draw(st.sampled_from([t for t in damaged.index if t.numel()]))
    bounds = torch.iinfo(tensor.dtype)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    tensor.view(-1)[place] = data.draw(st.sampled_from([-1, 0, 5, 47, 48, 1000, bounds.max, bounds.min]).filter(lambda v: bounds.min <= v <= bounds.max))
    if fault(damaged) is None:
        dense = unpack(damaged)
        assert dense.shape == (33, 48) and not dense.isnan().any()
        assert int((dense != 0).sum()) <= damaged.values.numel()


@pytest.mark.parametrize("name", FORMATS)
def test_loading_refuses_damage_in_one_sentence(name):
    dense = nn.Linear(48, 33)
    dense.weight.data = masked(33, 48, 0.7, "random", torch.Generator().manual_seed(0))
    layer = SparseLinear.from_dense(dense, format=name)
    x = torch.randn(4, 48)
    before = layer(x)
    good = layer.state_dict()
    for change in ({"layout": good["layout"][:3]}, {"layout": good["layout"].clone().fill_(77)}, {"values": good["values"].reshape(-1)[:-1]},
                   {"index0": torch.full_like(good["index0"], 101)}, {"index0": good["index0"].double()}, {"index0": good["index0"].reshape(-1)[:-1]}):
        with pytest.raises(RuntimeError, match="holds"):
            layer.load_state_dict(good | change)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    layer.load_state_dict(good)


@pytest.mark.parametrize("name", ["csr", "sparse_conv"])
def test_a_convolution_with_another_kernel_is_refused(name):
    one = SparseConv2d.from_dense(nn.Conv2d(16, 16, (3, 1), padding=(1, 0)), format=name)
    state = one.state_dict()
    assert fault(one.packed) is None
    state["index0"] = state["index0"] + (1 << 26)
    with pytest.raises(RuntimeError, match="outside|rise"):
        one.load_state_dict(state)
