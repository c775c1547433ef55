"""Oracle: dense 1x1 convolutions, which are products with a matrix, so that every format can hold their weight."""

import pytest
import torch
from torch import nn

from kernels import SparseConv2d, SparseLinear, candidates, epilogue
from kernels.table import layer_key

from .masks import masked

MATRICES = ("run16", "vector_block", "two_four", "compact")
GEOMETRIES = [{}, {"stride": (2, 3)}, {"padding": (1, 2)}, {"stride": 2, "padding": 1, "bias": False}, {"padding": "same", "dilation": 3}]


def pointwise(rows: int = 33, columns: int = 48, sparsity: float = 0.8, pattern: str = "random", height: int = 16, **options) -> nn.Conv2d:
    layer = nn.Conv2d(columns, rows, 1, **options)
    weight = masked(rows, columns, sparsity, pattern, torch.Generator().manual_seed(3), height)
    layer.weight.data = weight.view(rows, columns, 1, 1)
    return layer


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_convolution_and_gradients(name, options, last):
    dense = pointwise(**options)
    sparse = SparseConv2d.from_dense(dense, format=name)
    x = torch.randn(2, 48, 5, 7)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    given = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = sparse(given[0]), dense(given[1])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for result in (y, expected):
        result.square().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-4)
    sparse.values.data, kept = sparse.values.grad, dense.weight != 0
    torch.testing.assert_close(sparse.weight, dense.weight.grad * kept, rtol=1e-4, atol=1e-3)
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_epilogue_in_image_order(name):
    dense, scale, residual = pointwise(), torch.rand(33), torch.randn(2, 33, 5, 7)
    sparse = SparseConv2d.from_dense(dense, format=name, scale=scale, activation="gelu")
    x = torch.randn(2, 48, 5, 7)
    product = nn.functional.conv2d(x, dense.weight)
    expected = epilogue.finish(product, scale, dense.bias, residual, "gelu", dim=1)
    torch.testing.assert_close(sparse(x, residual), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse(x[0], residual[0]), expected[0], rtol=1e-4, atol=1e-5)
    assert sparse(x[:0]).shape == (0, 33, 5, 7)


def test_what_does_not_fit_is_told_in_image_order():
    sparse = SparseConv2d.from_dense(pointwise(), format="vector_block")
    with pytest.raises(ValueError, match=r"\[2, 5, 7, 48\], but a batch of images with 48 channels is needed"):
        sparse(torch.randn(2, 5, 7, 48))
    with pytest.raises(ValueError, match=r"residual has shape \[2, 33, 1, 1\], but the output has \[2, 33, 5, 7\]"):
        sparse(torch.randn(2, 48, 5, 7), torch.randn(2, 33, 1, 1))
    with pytest.raises(TypeError, match="convert one of them"):
        sparse(torch.randn(2, 48, 5, 7).half())
    with pytest.raises(ValueError, match="'vector_block' has no convolution of more than 1 x 1; sparse_conv, csr have one"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, (1, 3)), format="vector_block")


@pytest.mark.parametrize("name", MATRICES)
def test_round_trip_and_states(name):
    dense = pointwise(stride=2)
    sparse = SparseConv2d.from_dense(dense, format=name)
    assert torch.equal(sparse.to_dense().weight, dense.weight) and sparse.to_dense().stride == (2, 2)
    target = SparseConv2d.from_dense(pointwise(sparsity=0.3, stride=2), format="csr")
    target.load_state_dict(sparse.state_dict())
    x = torch.randn(1, 48, 5, 7)
    assert target.format == name and torch.equal(target(x), sparse(x))
    matrix = SparseLinear.from_dense(nn.Linear(48, 33), format=name)
    with pytest.raises(RuntimeError, match="this layer multiplies by a matrix"):
        matrix.load_state_dict(sparse.state_dict())
    wide = SparseConv2d.from_dense(nn.Conv2d(16, 33, (1, 3)), format="csr")
    with pytest.raises(RuntimeError, match="no convolution of more than 1 x 1"):
        wide.load_state_dict(sparse.state_dict())


def test_autocast_export_and_compilation():
    sparse = SparseConv2d.from_dense(pointwise(), format="vector_block")
    x = torch.randn(2, 48, 5, 7)
    expected = sparse(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(x.bfloat16()), sparse(x.bfloat16().float()))
    height = torch.export.Dim("height", min=2, max=64)
    exported = torch.export.export(sparse, (x,), dynamic_shapes=({2: height},)).module()
    assert torch.equal(exported(x), expected) and exported(x[:, :, :3]).shape == (2, 33, 3, 7)
    assert torch.equal(torch.compile(sparse, backend="aot_eager", fullgraph=True)(x), expected)


def test_multiply_accumulates():
    from torch.utils.flop_counter import FlopCounterMode

    sparse = SparseConv2d.from_dense(pointwise(stride=2), format="vector_block")
    with FlopCounterMode(display=False) as counter:
        sparse(torch.randn(2, 48, 5, 7))
    assert counter.get_total_flops() == 2 * sparse.kept * 2 * 3 * 4


def labels(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """What would be measured on a GPU, built here."""
    return {candidate.label: candidate.build() for candidate in candidates.on_gpu(layer, shape)}


def test_single_channel_vectors_are_offered_vector_blocks():
    """V x 1 vectors of 64 rows: no group of 16 channels is empty, so that sparse_conv has nothing to skip."""
    layer = pointwise(128, 64, 0.5, "blocks", 64)
    found = labels(layer, (2, 64, 14, 14))
    assert set(found) == {"vector_block 64", "vector_block 128"}
    x = torch.randn(2, 64, 14, 14)
    torch.testing.assert_close(found["vector_block 64"](x), layer(x), rtol=1e-4, atol=1e-4)
    wider = nn.Conv2d(64, 128, (1, 3))
    wider.weight.data = masked(128, 192, 0.5, "blocks", torch.Generator().manual_seed(3), 64).view(128, 64, 1, 3)
    assert not any(label.startswith("vector_block") for label in labels(wider, (2, 64, 14, 14)))


def test_random_masks_on_small_maps_are_offered_a_split_contraction():
    for channels in (512, 1024):
        layer = pointwise(64, channels, 0.9)
        for size in (7, 14):
            assert {"sparse_conv 64x16", "sparse_conv 128x16"} <= set(labels(layer, (1, channels, size, size)))
    assert labels(pointwise(64, 512, 0.9), (1, 512, 56, 56)) == {}
    assert "sparse_conv 64x16" in labels(pointwise(64, 512, 0.9, stride=2), (1, 512, 56, 56))
    assert labels(pointwise(64, 256, 0.9), (1, 256, 7, 7)) == {}


def test_few_pixels_are_few_columns():
    """What counts is the output: 4 x 4 pixels of one image, in half precision a 2:4 part from 256 pixels on."""
    layer = pointwise(64, 256, 0.9, stride=2)
    assert {"run16 nibbles 4 warps", "run16 bytes 8 warps"} <= set(labels(layer, (1, 256, 8, 8)))
    assert labels(layer, (1, 256, 9, 9)) == labels(layer, (2, 256, 8, 8)) == {}
    half = pointwise(64, 256, 0.9).bfloat16()
    assert set(labels(half, (1, 256, 16, 16))) == {"two_four"} and labels(half, (1, 256, 15, 16)) == {}
    assert "run16 bytes 4 warps" in labels(pointwise(64, 256, 0.9), (256, 2, 8)), "a single image without a batch"


def test_keys_tell_single_channel_vectors_apart():
    vectors, random = pointwise(128, 64, 0.5, "blocks", 64), pointwise(128, 64, 0.5)
    assert layer_key(vectors, (1, 64, 7, 7), True, 0.5) != layer_key(random, (1, 64, 7, 7), True, 0.5)
