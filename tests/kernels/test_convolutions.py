"""Oracle: `F.conv2d` with the dense weight, its autograd, and closed FLOP counts. No Triton is involved: CPU path."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import epilogue, formats
from kernels.csr import compiled
from kernels.csr.op import ENGINES

from .masks import masked

# channels, height, width, outputs, kernel, stride, padding, dilation
GEOMETRIES = [
    (5, 9, 11, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, 9, 11, 7, (3, 3), (2, 2), (1, 1), (1, 1)),
    (4, 13, 12, 6, (5, 3), (2, 1), (2, 0), (2, 1)),
    (3, 17, 19, 8, (7, 7), (3, 2), (3, 3), (1, 1)),
    (3, 6, 140, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (8, 7, 7, 9, (1, 1), (1, 1), (0, 0), (1, 1)),
    (8, 7, 7, 9, (1, 1), (2, 2), (0, 0), (1, 1)),
    (8, 7, 7, 9, (1, 1), (1, 1), (1, 1), (1, 1)),
    (2, 3, 3, 1, (3, 3), (1, 1), (0, 0), (1, 1)),
    (1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
]
FORMATS = ("csr", "sparse_conv")


def example(geometry, name="csr", dtype=torch.float32, batch=2, **options):
    channels, height, width, outputs, kernel, *_ = geometry
    columns = channels * kernel[0] * kernel[1]
    weight = masked(outputs, columns, 0.6, "random", torch.Generator().manual_seed(2)).to(dtype)
    if name == "sparse_conv":
        options["kernel"] = kernel
    x = torch.randn(batch, channels, height, width).to(dtype)
    return weight.view(outputs, channels, *kernel), formats.pack(name, weight, **options), x


def call(packed, geometry, x, values=None, scale=None, bias=None, residual=None, activation="none"):
    op = formats.conv_operator(packed.format)
    values = packed.values if values is None else values
    return op(x, values, packed.index, scale, bias, residual, packed.rows, packed.columns, packed.kept, list(packed.options), activation,
              *geometry[4:])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_engine_convolves(engine, geometry):
    if engine == "compiled" and compiled.library() is None:
        pytest.skip("this machine has no C compiler")
    weight, packed, x = example(geometry, engine=engine)
    bias = torch.randn(geometry[3])
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry[5:])
    torch.testing.assert_close(call(packed, geometry, x, bias=bias).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(packed, geometry, x, bias=bias, activation="relu").double(), F.relu(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
def test_gradients_equal_those_of_the_dense_convolution(name, activation):
    geometry = GEOMETRIES[1]
    weight, packed, x = example(geometry, name)
    x.requires_grad_()
    scale, bias = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    values, dense = packed.values.clone().requires_grad_(), weight.clone().requires_grad_()
    residual = torch.randn(2, 7, 5, 6, requires_grad=True)
    y = call(packed, geometry, x, values, scale, bias, residual, activation)
    expected = epilogue.finish(F.conv2d(x, dense, None, *geometry[5:]), scale, bias, residual, activation, dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, values, scale, bias, residual), upstream)
    wanted = torch.autograd.grad(expected, (x, dense, scale, bias, residual), upstream)
    for number in (0, 2, 3, 4):
        torch.testing.assert_close(got[number], wanted[number], rtol=1e-4, atol=1e-4)
    gradient = formats.unpack(replace(packed, values=got[1])).view_as(weight)
    torch.testing.assert_close(gradient, wanted[1] * (weight != 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_torch_library_checks(name):
    geometry = GEOMETRIES[1]
    _, packed, x = example(geometry, name)
    values = packed.values.clone().requires_grad_()
    arguments = (x.requires_grad_(), values, packed.index, None, torch.randn(7), None, 7, 45, packed.kept, list(packed.options), "relu",
                 *geometry[4:])
    torch.library.opcheck(formats.conv_operator(name), arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_flops_count_kept_weights_only(name):
    geometry = GEOMETRIES[1]
    weight, packed, x = example(geometry, name)
    with FlopCounterMode(display=False) as counter:
        call(packed, geometry, x)
    assert counter.get_total_flops() == 2 * int((weight != 0).sum()) * 2 * 5 * 6


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_and_wrong_input(name):
    geometry = GEOMETRIES[0]
    weight, packed, x = example(geometry, name)
    expected = F.conv2d(x, weight, None, *geometry[5:])
    torch.testing.assert_close(call(packed, geometry, x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(packed, geometry, x.transpose(2, 3).contiguous().transpose(2, 3)), expected, rtol=1e-4, atol=1e-4)
    assert call(packed, geometry, x[:0]).shape == (0, 7, 9, 11)
    for bad, error, message in (
        (x[:, :4], ValueError, "images with 5 channels"),
        (x[0], ValueError, "images with 5 channels"),
        (x.double(), TypeError, "float64"),
    ):
        with pytest.raises(error, match=message):
            call(packed, geometry, bad)
    with pytest.raises(ValueError, match="smaller than the convolution's kernel"):
        call(packed, (*geometry[:6], (0, 0), (1, 1)), x[:, :, :2])


@pytest.mark.parametrize("batch", [1, 2, 9, 16, 33, 200])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_multiplies(engine, batch):
    if engine == "compiled" and compiled.library() is None:
        pytest.skip("this machine has no C compiler")
    weight = masked(37, 91, 0.7, "empty_rows", torch.Generator().manual_seed(5))
    packed = formats.pack("csr", weight, engine=engine)
    x, bias = torch.randn(batch, 91), torch.randn(37)
    op = formats.linear_operator("csr")
    y = op(x, packed.values, packed.index, None, bias, None, 37, 91, packed.kept, list(packed.options), "relu")
    torch.testing.assert_close(y.double(), F.relu(x.double() @ weight.double().t() + bias.double()), rtol=1e-4, atol=1e-4)


def test_half_precision_falls_back_to_dense_on_the_cpu():
    weight = masked(8, 20, 0.5, "random", torch.Generator().manual_seed(6)).bfloat16()
    packed = formats.pack("csr", weight)
    x = torch.randn(3, 20).bfloat16()
    y = formats.linear_operator("csr")(x, packed.values, packed.index, None, None, None, 8, 20, packed.kept, list(packed.options), "none")
    torch.testing.assert_close(y, x @ weight.t())


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine 'mkl' is not one of"):
        formats.pack("csr", torch.ones(2, 2), engine="mkl")
