"""Oracle: `nn.Conv2d` on empty and unbatched images, and float32 arithmetic where float16 would overflow in between."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels import SparseConv2d, SparseLinear, epilogue, operator

from .guarded import surround
from .test_modules import CONV, LINEAR, conv


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("inputs, outputs, batch", [(3, 0, 2), (0, 4, 2), (0, 0, 1), (3, 4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_convolutions(name, inputs, outputs, batch):
    dense = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.normal_(dense.bias)  # without inputs torch leaves it as the memory was
    sparse = SparseConv2d.from_dense(dense, format=name)
    x = torch.randn(batch, inputs, 5, 6, requires_grad=True)
    y = sparse(x)
    assert y.shape == (batch, outputs, 5, 6) and torch.equal(y, dense.bias.view(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert not x.grad.any() or outputs and inputs
    assert sparse.values.grad.shape == sparse.values.shape and torch.equal(sparse.bias.grad, torch.full((outputs,), 30.0 * batch))
    assert sparse.weight.shape == dense.weight.shape


@pytest.mark.parametrize("name", CONV)
def test_one_image_without_a_batch(name):
    dense = conv()
    sparse = SparseConv2d.from_dense(dense, format=name, activation="relu")
    x, residual = torch.randn(6, 9, 8, requires_grad=True), torch.randn(10, 9, 8)
    y, expected = sparse(x, residual), F.relu(dense(x) + residual)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="images with 6 channels"):
        sparse(x[0])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
def test_a_scale_brings_float16_back_from_beyond_its_range(name, activation):
    dense = nn.Linear(64, 8, bias=False)
    dense.weight.data.fill_(100.0)
    scale = nn.Parameter(torch.full((8,), 2.0**-12))
    sparse = SparseLinear.from_dense(dense, format=name, scale=scale, activation=activation).half()
    x = torch.full((3, 64), 100.0).half()
    expected = epilogue.activate(torch.full((3, 8), 640000 * 2.0**-12), activation)
    y = sparse(x)
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=0)
    (y * 2.0**-6).sum().backward()
    torch.testing.assert_close(sparse.scale.grad.float(), torch.full((8,), 3 * 640000 * 2.0**-6), rtol=1e-3, atol=0)


def test_a_scale_brings_a_float16_convolution_back():
    dense = nn.Conv2d(16, 8, 2, bias=False)
    dense.weight.data.fill_(100.0)
    for name in CONV:
        sparse = SparseConv2d.from_dense(dense, format=name, scale=torch.full((8,), 2.0**-12)).half()
        y = sparse(torch.full((1, 16, 3, 3), 100.0).half())
        torch.testing.assert_close(y.float(), torch.full((1, 8, 2, 2), 640000 * 2.0**-12), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("word", [torch.int16, torch.int32, torch.int64])
def test_the_guard_bands_are_not_a_number_in_any_reading(dtype, word):
    if word.itemsize < dtype.itemsize:
        return
    _, whole, _ = surround(torch.zeros(4, dtype=word), poison=True)
    assert whole.view(dtype).isnan().all()


@pytest.mark.parametrize("triton_version, numpy_version, works", [("3.6.0", "2.4.1", False), ("3.6.0", "2.3.9", True), ("3.7.1", "2.4.1", True), ("3.10.0", "2.5.0", True)])
def test_an_interpreter_that_cannot_run_is_refused_in_a_sentence(triton_version, numpy_version, works, monkeypatch):
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    operator.interpreter_fault.cache_clear()
    try:
        with contextlib.nullcontext() if works else pytest.raises(RuntimeError, match=r"Triton 3.6.0 cannot run under NumPy 2.4.1: install triton>=3.7 or numpy<2.4"):
            assert operator.runs_triton(torch.ones(1))
    finally:
        operator.interpreter_fault.cache_clear()
