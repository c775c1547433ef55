"""Oracle: the dense layers that the sparse modules were made from, and their state_dicts."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from kernels import SparseConv2d, SparseLinear

from .masks import masked
from .subprocesses import ROOT

LINEAR = ("run16", "vector_block", "sparse_conv", "two_four", "compact", "csr")
CONV = ("csr", "sparse_conv")


def linear(sparsity=0.7, rows=33, columns=48, bias=True) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias)
    layer.weight.data = masked(rows, columns, sparsity, "random", torch.Generator().manual_seed(int(100 * sparsity)))
    return layer


def conv(sparsity=0.7, **options) -> nn.Conv2d:
    layer = nn.Conv2d(6, 10, 3, **{"padding": 1, **options})
    layer.weight.data = masked(10, 54, sparsity, "random", torch.Generator().manual_seed(7)).view(10, 6, 3, 3)
    return layer


@pytest.mark.parametrize("name", LINEAR)
def test_linear_round_trip(name):
    dense = linear().eval()
    sparse = SparseLinear.from_dense(dense, format=name)
    x = torch.randn(4, 48)
    torch.testing.assert_close(sparse(x), dense(x))
    back = sparse.to_dense()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert not back.training and sparse.density == pytest.approx(float((dense.weight != 0).float().mean()))
    assert torch.equal(sparse.weight, dense.weight) and (sparse.in_features, sparse.out_features) == (48, 33)


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"bias": False}])
def test_conv_round_trip(name, options):
    dense = conv(**options)
    sparse = SparseConv2d.from_dense(dense, format=name)
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
    back = sparse.to_dense()
    assert torch.equal(back.weight, dense.weight) and back.stride == dense.stride and (back.bias is None) == (dense.bias is None)
    torch.testing.assert_close(back(x), dense(x))


@pytest.mark.parametrize("name", LINEAR)
def test_state_dict_loads_into_a_layer_of_another_sparsity(name):
    source = SparseLinear.from_dense(linear(0.5), format=name)
    target = SparseLinear.from_dense(linear(0.95), format="csr")
    state = source.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    missing, unexpected = target.load_state_dict(state)
    assert not missing and not unexpected
    x = torch.randn(3, 48)
    assert torch.equal(target(x), source(x)) and target.format == name and target.kept == source.kept
    state["values"].zero_()
    assert target.weight.any()


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="holds a weight of 33 x 48, but this layer has 32 x 48"):
        SparseLinear.from_dense(linear(rows=32)).load_state_dict(SparseLinear.from_dense(linear()).state_dict())


@pytest.mark.parametrize("name", LINEAR)
def test_fine_tuning_keeps_the_mask_and_equals_dense_training_on_it(name):
    dense = linear(0.8)
    sparse = SparseLinear.from_dense(dense, format=name)
    mask = dense.weight.detach() != 0
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for m in (dense, sparse)]
    for step in range(5):
        x, target = torch.randn(8, 48), torch.randn(8, 33)
        for module, optimizer in zip((dense, sparse), optimizers):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            if module is dense:
                dense.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(sparse.weight, dense.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sparse.bias, dense.bias, rtol=1e-4, atol=1e-6)
    assert torch.equal(sparse.weight != 0, mask)


def test_compile_and_export():
    module = nn.Sequential(SparseLinear.from_dense(linear(), activation="relu"), nn.Unflatten(1, (33, 1, 1)), nn.Conv2d(33, 6, 1),
                           SparseConv2d.from_dense(conv()))
    x = torch.randn(5, 48)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), expected[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_compiled_by_inductor(name):
    """Forward and gradients, every epilogue; inductor may hand an operator memory in another order than eager code does."""
    dense = linear()
    module = SparseLinear.from_dense(dense, format=name, scale=torch.rand(33) + 0.5, activation="gelu")
    compiled = torch.compile(lambda x, residual: module(x.sin(), residual.cos()).square(), fullgraph=True)
    results = []
    for run in (compiled, lambda x, residual: module(x.sin(), residual.cos()).square()):
        generator = torch.Generator().manual_seed(3)
        x, residual = (torch.randn(5, size, generator=generator).requires_grad_() for size in (48, 33))
        y = run(x, residual)
        results.append((y, *torch.autograd.grad(y.sum(), (x, residual, module.values, module.bias))))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_epilogue_in_the_module():
    dense = linear()
    scale, residual, x = torch.rand(33) + 0.5, torch.randn(4, 33), torch.randn(4, 48)
    sparse = SparseLinear.from_dense(dense, scale=scale, activation="silu")
    expected = nn.functional.silu(x @ dense.weight.t() * scale + dense.bias + residual)
    torch.testing.assert_close(sparse(x, residual), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot hold this layer's scale"):
        sparse.to_dense()


def test_representation_names_the_facts():
    sparse = SparseLinear.from_dense(linear(), format="run16")
    text = repr(sparse)
    assert "in_features=48, out_features=33, bias=True" in text and "format=run16" in text and f"density={sparse.density:.3f}" in text


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="2 groups"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="padding mode 'reflect'"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="has no convolution"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), format="run16")
    with pytest.raises(TypeError, match="float64"):
        SparseLinear.from_dense(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="bool mask of the weight's shape"):
        SparseLinear.from_dense(nn.Linear(3, 3), mask=torch.ones(3, 2, dtype=torch.bool))


def test_package_imports_without_triton_and_without_torch():
    code = (
        "import sys; sys.modules['triton'] = None; import kernels; assert 'torch' not in sys.modules; "
        "from kernels import SparseLinear, sparsify; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
