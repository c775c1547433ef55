"""Oracle: autograd through the dense product with the same weights, and closed FLOP counts. No Triton is involved: CPU path."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import epilogue, formats
from kernels.operator import check_linear

from .masks import masked

LINEAR = ("run16", "vector_block", "sparse_conv", "two_four", "compact", "csr")


def call(packed, x, values=None, scale=None, bias=None, residual=None, activation="none"):
    op = formats.linear_operator(packed.format)
    values = packed.values if values is None else values
    return op(x, values, packed.index, scale, bias, residual, packed.rows, packed.columns, packed.kept, list(packed.options), activation)


def example(name, rows=33, columns=48, dtype=torch.float32):
    weight = masked(rows, columns, 0.6, "random", torch.Generator().manual_seed(1)).to(dtype)
    return weight, formats.pack(name, weight)


@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("name", LINEAR)
def test_gradients_equal_those_of_the_dense_product(name, activation):
    weight, packed = example(name)
    x, residual = torch.randn(3, 5, 48, requires_grad=True), torch.randn(3, 5, 33, requires_grad=True)
    scale, bias = torch.randn(33, requires_grad=True), torch.randn(33, requires_grad=True)
    values, dense = packed.values.clone().requires_grad_(), weight.clone().requires_grad_()
    y = call(packed, x, values, scale, bias, residual, activation)
    expected = epilogue.finish(x @ dense.t(), scale, bias, residual, activation)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, values, scale, bias, residual), upstream)
    wanted = torch.autograd.grad(expected, (x, dense, scale, bias, residual), upstream)
    torch.testing.assert_close(y, expected)
    for number in (0, 2, 3, 4):
        torch.testing.assert_close(got[number], wanted[number], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(formats.unpack(replace(packed, values=got[1])), wanted[1] * (weight != 0), rtol=1e-4, atol=1e-5)
    padding = formats.positions(packed) == weight.numel()
    assert not got[1][padding].any()


@pytest.mark.parametrize("name, activation", list(zip(LINEAR, ("relu", "gelu", "silu", "none", "relu", "gelu"))))
@pytest.mark.parametrize("full", [False, True])
def test_torch_library_checks(name, activation, full):
    """torch.library.opcheck: schema, fake kernel, autograd registration and AOT dispatch with dynamic shapes."""
    _, packed = example(name)
    x, values = torch.randn(3, 48, requires_grad=True), packed.values.clone().requires_grad_()
    given = [torch.randn(*shape, requires_grad=True) if full else None for shape in ((33,), (33,), (3, 33))]
    arguments = (x, values, packed.index, *given, 33, 48, packed.kept, list(packed.options), activation)
    torch.library.opcheck(formats.linear_operator(name), arguments)


@pytest.mark.parametrize("name", LINEAR)
def test_flops_count_kept_weights_only(name):
    weight, packed = example(name)
    with FlopCounterMode(display=False) as counter:
        call(packed, torch.randn(2, 7, 48))
    assert counter.get_total_flops() == 2 * int((weight != 0).sum()) * 14


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (1, 48)])
def test_batch_shapes(name, shape):
    weight, packed = example(name)
    x = torch.randn(*shape)
    torch.testing.assert_close(call(packed, x), x @ weight.t())


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rows, columns", [(0, 8), (8, 0), (0, 0)])
def test_empty_matrices(name, rows, columns):
    packed = formats.pack(name, torch.zeros(rows, columns))
    bias = torch.randn(rows)
    assert torch.equal(call(packed, torch.randn(3, columns), bias=bias), bias.expand(3, rows))


@pytest.mark.parametrize("name", LINEAR)
def test_non_contiguous_input_and_wrong_input(name):
    weight, packed = example(name)
    x = torch.randn(48, 6).t()
    torch.testing.assert_close(call(packed, x), x @ weight.t())
    for bad, error, message in (
        (torch.randn(3, 46), ValueError, "last dimension must be 48"),
        (torch.randn(3, 48).double(), TypeError, "float64"),
    ):
        with pytest.raises(error, match=message):
            call(packed, bad)
    with pytest.raises(ValueError, match="is on meta, but the packed weight is on cpu"):
        check_linear(torch.randn(3, 48, device="meta"), packed.values, {}, None, 33, 48)
    with pytest.raises(ValueError, match="one number per output row"):
        call(packed, torch.randn(3, 48), bias=torch.randn(32))
    with pytest.raises(ValueError, match="residual has shape"):
        call(packed, torch.randn(3, 48), residual=torch.randn(3, 32))
    with pytest.raises(ValueError, match="activation"):
        call(packed, torch.randn(3, 48), activation="tanh")


@pytest.mark.parametrize("name", LINEAR)
def test_nan_weights_reach_only_their_row(name):
    weight, _ = example(name)
    weight[4, 7] = float("nan")
    y = call(formats.pack(name, weight), torch.randn(2, 48))
    assert torch.equal(torch.isnan(y), torch.arange(33).eq(4).expand(2, 33))
