"""Oracle: float64 products on the CPU. Every kernel on every NVIDIA GPU that is there; skipped where there is none."""

import pytest
import torch
from torch.nn import functional as F

from kernels import epilogue, formats
from kernels.operator import has_triton, interpreted

from .interpreted import DTYPES, ROUNDINGS, TOLERANCE, relative_error
from .masks import masked

GPUS = [f"cuda:{number}" for number in range(min(2, torch.cuda.device_count()))] if torch.version.hip is None else []
pytestmark = pytest.mark.skipif(not GPUS or interpreted() or not has_triton(), reason="needs an NVIDIA GPU and compiled Triton kernels")
LINEAR = ("run16", "vector_block", "sparse_conv", "two_four", "compact", "csr")


def to(device, packed):
    return packed.values.to(device), [tensor.to(device) for tensor in packed.index]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def drawn(seed, dtype, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("device", GPUS or ["cuda:0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 4, 9, 64, 300])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_with_everything(name, batch, dtype, device):
    """Full epilogue; twice, the second time under a CUDA graph, and both bit for bit the same."""
    rows, columns = 208, 1040
    weight = masked(rows, columns, 0.8, "random", torch.Generator().manual_seed(batch)).to(dtype)
    packed, op = formats.pack(name, weight), formats.linear_operator(name)
    x, scale, bias, residual = drawn(batch, dtype, (batch, columns), (rows,), (rows,), (batch, rows))
    activation = epilogue.ACTIVATIONS[batch % 4]
    expected = epilogue.finish(x.double() @ weight.double().t(), scale.double(), bias.double(), residual.double(), activation)
    given = [tensor.to(device) for tensor in (x, scale, bias, residual)]
    values, index = to(device, packed)

    def run():
        return op(given[0], values, index, *given[1:], rows, columns, packed.kept, list(packed.options), activation)

    y = run()
    assert str(y.device) == device and y.dtype == dtype
    assert relative_error(y.cpu(), expected) <= ROUNDINGS.get(name, 1) * TOLERANCE[dtype]
    if name in ("run16", "vector_block", "sparse_conv"):
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = run()
            graph.replay()
            graph.replay()
            torch.cuda.synchronize()
        assert torch.equal(again, y)


@pytest.mark.parametrize("device", GPUS or ["cuda:0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, size, batch", [(64, 7, 1), (64, 28, 4), (5, 14, 2)])
def test_convolution_with_everything(channels, size, batch, dtype, device):
    rows = 80
    weight = masked(rows, channels * 9, 0.8, "random", torch.Generator().manual_seed(size)).to(dtype)
    packed = formats.pack("sparse_conv", weight, kernel=(3, 3))
    out = (size - 1) // 2 + 1
    x, scale, bias, residual = drawn(size, dtype, (batch, channels, size, size), (rows,), (rows,), (batch, rows, out, out))
    product = F.conv2d(x.double(), weight.double().view(rows, channels, 3, 3), None, 2, 1)
    expected = epilogue.finish(product, scale.double(), bias.double(), residual.double(), "silu", dim=1)
    given = [tensor.to(device) for tensor in (x, scale, bias, residual)]
    values, index = to(device, packed)
    y = formats.conv_operator("sparse_conv")(given[0], values, index, *given[1:], rows, channels * 9, packed.kept, list(packed.options), "silu",
                                             (3, 3), (2, 2), (1, 1), (1, 1))
    assert str(y.device) == device and y.dtype == dtype and relative_error(y.cpu(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", GPUS or ["cuda:0"])
@pytest.mark.parametrize("name", ["run16", "two_four", "csr"])
def test_float16_beyond_its_range_and_addresses_between_words(name, device):
    weight, scale = torch.full((16, 64), 100.0).half(), torch.full((16,), 2.0**-12).half().to(device)
    packed, op = formats.pack(name, weight), formats.linear_operator(name)
    values, index = to(device, packed)
    flat = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    for x in (torch.full((8 * 64 + 1,), 100.0).half().to(device)[1:].view(8, 64), torch.full((8 * 64 + 1,), 100.0).half().to(device)[1:].view(64, 8).t()):
        y = op(x, flat, index, scale, None, None, 16, 64, packed.kept, list(packed.options), "none")
        torch.testing.assert_close(y.cpu().float(), torch.full((8, 16), 156.25), rtol=1e-3, atol=0)
