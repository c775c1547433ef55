"""Oracle: `F.conv2d` in float64, computed in one piece."""

import pytest
import torch
from torch.nn import functional as F

from kernels.csr import compiled, op
from kernels.csr.op import ENGINES

from .test_convolutions import GEOMETRIES, call, example


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("geometry", GEOMETRIES[:5])
@pytest.mark.parametrize("lines", [1, 4, 20, 1000])
def test_a_convolution_in_pieces_is_the_same_and_holds_few_patches(engine, geometry, lines, monkeypatch):
    if engine == "compiled" and compiled.library() is None:
        pytest.skip("this machine has no C compiler")
    weight, packed, x = example(geometry, engine=engine, batch=5)
    bias = torch.randn(geometry[3])
    expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *geometry[5:]))
    limit = lines * 4 * packed.columns * expected.shape[3]
    unfold, seen = F.unfold, []

    def watched(*arguments):
        patches = unfold(*arguments)
        seen.append(patches.numel() * 4)
        return patches

    monkeypatch.setattr(op, "PATCHES", limit)
    monkeypatch.setattr(F, "unfold", watched)
    monkeypatch.setattr(compiled, "REACH", x[0].numel() if engine == "compiled" else compiled.REACH)
    y = call(packed, geometry, x, bias=bias, activation="relu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous() and seen and max(seen) <= limit
    per_piece = min(lines, lines // expected.shape[2] * expected.shape[2] or lines)
    assert len(seen) <= 5 * -(-expected.shape[2] // per_piece)


def test_patches_of_large_images_stay_below_the_limit(monkeypatch):
    """Sizes only: 128 images of 64 x 224 x 224 would need 14.8 GB of patches."""
    sizes = []

    def unfold(x, kernel, dilation, padding, stride):
        height = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        width = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
        patches = torch.empty(x.shape[0], x.shape[1] * 9, height * width, device="meta")
        sizes.append(patches.numel() * 4)
        return patches

    monkeypatch.setattr(F, "unfold", unfold)
    monkeypatch.setattr(op, "_product", lambda patches, *rest: (patches.new_empty(patches.shape[0], 32, patches.shape[2]), False))
    x, unit = torch.empty(128, 64, 224, 224, device="meta"), (1, 1)
    y, _ = op._by_patches(x, None, None, None, False, 32, 576, "torch", (224, 224), (3, 3), unit, unit, unit)
    assert y.shape == (128, 32, 224, 224) and max(sizes) <= op.PATCHES <= 2**28 and sum(sizes) == 128 * 576 * 224 * 224 * 4


def test_an_image_beyond_the_reach_is_not_convolved_by_offsets():
    x = torch.empty(1, 64, 8192, 8192, device="meta")
    assert compiled.reaches(x[:, :31], (1, 1), (0, 0)) and not compiled.reaches(x, (1, 1), (0, 0))
    assert not compiled.reaches(x[:, :32], (1, 1), (1, 1))
