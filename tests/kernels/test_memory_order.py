"""Oracle: the dense layer with the same numbers in contiguous memory, and the order that packing in the new data type gives."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels import SparseConv2d, SparseLinear, formats

from .test_modules import CONV, LINEAR, conv, linear
from .test_operators import call

HALVES = (torch.bfloat16, torch.float16)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first two dimensions exchanged in memory, or with gaps."""
    if tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack([tensor, torch.full_like(tensor, 3)], -1)[..., 0]


def exact(dense: nn.Module) -> nn.Module:
    """Weights that every data type holds, no two of one magnitude in a row of four, so that conversions change nothing."""
    weight = dense.weight.data
    places = torch.arange(1.0, weight.numel() + 1).view_as(weight) % 127 + 1
    weight.copy_(torch.where(weight != 0, places / 64, 0.0))
    dense.bias.data.copy_(torch.arange(dense.bias.numel()) / 4)
    return dense


@pytest.mark.parametrize("name", LINEAR)
def test_strided_vectors_and_values_in_a_linear(name):
    packed = formats.pack(name, linear().weight)
    loose = replace(packed, values=strided(packed.values), index=[strided(tensor) for tensor in packed.index])
    x, bias, scale, residual = torch.randn(6, 48), torch.randn(33), torch.rand(33), torch.randn(33, 6).t()
    assert torch.equal(call(loose, strided(x), bias=strided(bias), activation="relu"), call(packed, x, bias=bias, activation="relu"))
    given = {"scale": scale, "bias": bias, "residual": residual}
    assert torch.equal(call(loose, x, **{key: strided(value) for key, value in given.items()}), call(packed, x, **given))


@pytest.mark.parametrize("name", CONV)
def test_strided_bias_in_a_convolution(name):
    dense = conv()
    sparse = SparseConv2d.from_dense(dense, format=name)
    x = torch.randn(2, 6, 9, 8)
    sparse.bias.data = strided(dense.bias.detach())
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_strided_tensors_of_a_state(name, assign):
    dense = linear()
    state = {key: strided(value) for key, value in SparseLinear.from_dense(dense, format=name).state_dict().items()}
    loaded = SparseLinear.from_dense(linear(0.2), format=name)
    loaded.load_state_dict(state, assign=assign)
    assert all(tensor.is_contiguous() for tensor in (loaded.values, *loaded.index))
    x = torch.randn(4, 48)
    torch.testing.assert_close(loaded(x), dense(x))
    assert torch.equal(loaded.weight, dense.weight)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["run16", "two_four"])
def test_a_conversion_gives_the_order_of_packing_in_that_type(name, half):
    dense = exact(linear())
    for before, after in ((torch.float32, half), (half, torch.float32)):
        converted = SparseLinear.from_dense(copy.deepcopy(dense).to(before), format=name)
        converted.values.grad = converted.values.detach().clone()
        parameter = converted.values
        converted = nn.Sequential(converted).to(after)[0]
        wanted = SparseLinear.from_dense(copy.deepcopy(dense).to(after), format=name)
        assert torch.equal(converted.values, wanted.values) and converted.values.dtype == after
        assert torch.equal(converted.values.grad, wanted.values) and converted.values is parameter


@pytest.mark.parametrize("name", LINEAR)
def test_conversions_and_loading_keep_the_weight(name):
    dense, x = exact(linear()), torch.randint(-4, 5, (5, 48)).float()
    for before, after in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        source = SparseLinear.from_dense(copy.deepcopy(dense).to(before), format=name)
        state = copy.deepcopy(source.state_dict())
        assert torch.equal(source.to(after).weight, dense.weight.to(after))
        torch.testing.assert_close(source(x.to(after)), dense(x).to(after))
        loaded = SparseLinear.from_dense(linear(0.3).to(after), format="csr")
        loaded.load_state_dict(state)
        assert loaded.values.dtype == after and torch.equal(loaded.weight, dense.weight.to(after))
        assert torch.equal(loaded.values, source.values)
        loaded = SparseLinear.from_dense(linear(0.3).to(after), format=name)
        loaded.load_state_dict(state, assign=True)
        assert loaded.values.dtype == before and torch.equal(loaded.weight, dense.weight.to(before))


@pytest.mark.parametrize("name", LINEAR)
def test_channels_last_does_not_reach_the_values(name):
    dense = linear(columns=640).bfloat16()
    sparse = SparseLinear.from_dense(dense, format=name)
    before = sparse.values.detach().clone()
    sparse.to(memory_format=torch.channels_last)
    assert sparse.values.is_contiguous() and torch.equal(sparse.values, before)


@pytest.mark.parametrize("same", [True, False])
def test_an_optimizer_made_before_loading_trains_what_was_loaded(same):
    source = SparseLinear.from_dense(linear(), format="csr")
    target = SparseLinear.from_dense(linear(), format="csr").to(torch.float32 if same else torch.bfloat16)
    optimizer = torch.optim.SGD(target.parameters(), 0.5)
    target.load_state_dict(source.state_dict())
    before = target.weight
    target(torch.ones(1, 48, dtype=target.values.dtype)).sum().backward()
    optimizer.step()
    assert torch.equal(target.weight, torch.where(before != 0, before - 0.5, 0))


def test_a_layer_on_the_meta_device_takes_a_state():
    dense, buffer = linear(), io.BytesIO()
    torch.save(SparseLinear.from_dense(dense, format="run16").state_dict(), buffer)
    buffer.seek(0)
    layer = SparseLinear.from_dense(linear(0.2), format="csr").to("meta")
    layer.load_state_dict(torch.load(buffer), assign=True)
    assert torch.equal(layer.weight, dense.weight) and layer.layout.device.type == "cpu"
    torch.testing.assert_close(layer(torch.ones(1, 48)), dense(torch.ones(1, 48)))
