"""Oracle: the same layers without autocast, and the dense layers' gradients in float32."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from kernels import SparseConv2d, SparseLinear
from kernels.csr import compiled

from .subprocesses import ROOT
from .test_modules import CONV, LINEAR, conv, linear

LAYERS = [("linear", name) for name in LINEAR] + [("conv", name) for name in CONV]


def layers(kind: str, name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A dense layer, its packed form and an input."""
    generator = torch.Generator().manual_seed(4)
    if kind == "linear":
        dense, x = linear(), torch.randn(5, 48, generator=generator)
        return dense, SparseLinear.from_dense(dense, format=name), x
    dense, x = conv(), torch.randn(2, 6, 9, 8, generator=generator)
    return dense, SparseConv2d.from_dense(dense, format=name), x


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind, name", LAYERS)
def test_a_float32_layer_computes_in_float32(kind, name):
    _, sparse, x = layers(kind, name)
    expected = sparse(x)
    with autocast():
        y, rounded = sparse(x), sparse(x.bfloat16())
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, sparse(x.bfloat16().float()))


@pytest.mark.parametrize("kind, name", LAYERS)
def test_a_bfloat16_layer_takes_what_comes(kind, name):
    _, sparse, x = layers(kind, name)
    sparse = sparse.bfloat16()
    expected = sparse(x.bfloat16())
    with autocast():
        assert torch.equal(sparse(x), expected) and torch.equal(sparse(x.bfloat16()), expected)
    with pytest.raises(TypeError, match="convert one of them"):
        sparse(x)


@pytest.mark.parametrize("kind, name", LAYERS)
@pytest.mark.parametrize("compiled_by", [None, "aot_eager"])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_those_of_the_dense_layer(kind, name, compiled_by, half):
    dense, sparse, x = layers(kind, name)
    torch.compiler.reset()  # recompilations are counted per line of code, and all cases share forward
    run = sparse if compiled_by is None else torch.compile(sparse, backend=compiled_by, fullgraph=True)
    given = x.bfloat16().requires_grad_() if half else x.clone().requires_grad_()
    with autocast():
        y = run(given)
        y.square().sum().backward()
    x = given.detach().float().requires_grad_()
    dense(x).square().sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-4}
    assert y.dtype == torch.float32 and given.grad.dtype == given.dtype
    torch.testing.assert_close(given.grad.float(), x.grad, **tolerance)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    sparse.values.data, kept = sparse.values.grad, dense.weight != 0
    torch.testing.assert_close(sparse.weight, dense.weight.grad * kept, rtol=1e-4, atol=1e-4)


def test_residual_and_scale_are_converted_with_the_input():
    sparse = SparseLinear.from_dense(linear(), scale=torch.rand(33), activation="gelu")
    x, residual = torch.randn(3, 48), torch.randn(3, 33)
    with autocast():
        assert torch.equal(sparse(x, residual.bfloat16()), sparse(x, residual.bfloat16().float()))
    with autocast(), pytest.raises(TypeError, match="the input is torch.float64"):
        sparse(x.double())


def test_a_layer_among_dense_layers_trains_and_exports():
    net = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), SparseLinear.from_dense(linear(), format="run16"), nn.Linear(33, 2))
    x = torch.randn(4, 48)
    with autocast():
        expected = net(x)
        exported = torch.export.export(net, (x,)).module()(x)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(exported, expected)
    expected.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in net.parameters())


@pytest.mark.skipif(compiled.library() is None, reason="this machine has no C compiler")
@pytest.mark.parametrize("setting", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
                                     "torch.set_default_dtype(torch.bfloat16)", "torch.autocast('cpu', dtype=torch.bfloat16).__enter__()",
                                     "torch.set_grad_enabled(False)"])
def test_the_first_use_of_the_compiled_kernels_under_any_setting(setting):
    code = (
        f"import torch; {setting}; from kernels.csr import compiled; assert compiled.library() is not None; from torch import nn; "
        "from kernels import SparseLinear, SparseConv2d; one = {'dtype': torch.float32, 'device': 'cpu'}; "
        "x = torch.ones(3, 8, **one); y = SparseLinear.from_dense(nn.Linear(8, 5, False, **one))(x); assert y.dtype == torch.float32; "
        "x = torch.ones(1, 2, 5, 5, **one); y = SparseConv2d.from_dense(nn.Conv2d(2, 5, 3, **one))(x); assert y.device.type == 'cpu'; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
