"""Oracle: torch.nn.functional.unfold on the explicitly padded input, and float64 sums."""

import pytest
import torch
from torch import nn

from compress.curvature import moments
from compress.curvature.geometry import geometry
from tests.compress.curvature.nets import randn

CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "no padding": dict(kernel_size=3),
    "rows and columns differ": dict(kernel_size=(3, 2), padding=(2, 0), dilation=(1, 2)),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "stride along the width": dict(kernel_size=3, stride=(1, 2), padding=1),
    "even, same": dict(kernel_size=4, padding="same"),
    "groups": dict(kernel_size=3, padding=1, groups=3),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "circular, same": dict(kernel_size=3, padding="same", padding_mode="circular", groups=2),
    "more padding than half": dict(kernel_size=5, padding=4),
    "dilation": dict(kernel_size=3, padding=2, dilation=2),
    "pixels left out": dict(kernel_size=2, stride=3),
}


def windows(geo, x):
    """[b, groups, d, T] in the order (c, kh, kw)."""
    unfolded = nn.functional.unfold(geo.pad(x), geo.kernel, geo.dilation, 0, geo.stride)
    return unfolded.reshape(x.shape[0], geo.groups, geo.window, -1)


@pytest.mark.parametrize("case", list(CONVS))
@pytest.mark.parametrize("size", [(12, 13), (7, 6), (17, 9)])
def test_sums_equal_those_of_the_unfolded_input(case, size):
    geo, x = geometry(nn.Conv2d(6, 6, **CONVS[case])), randn(3, 6, *size)
    a, c = windows(geo, x), 6 // geo.groups
    zeros = {"dtype": torch.float64}
    total, sums = torch.zeros(geo.groups, geo.window, geo.window, **zeros), torch.zeros(geo.groups, geo.window, **zeros)
    moments.add_patches(total, sums, x, geo)
    expected = torch.einsum("bgdt,bget->gde", a, a)
    torch.testing.assert_close(moments.natural_order(moments.mirror(total), geo, 2), expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(moments.natural_order(sums, geo, 1), a.sum((0, 3)), rtol=1e-12, atol=1e-10)
    channels = torch.zeros(geo.groups, c, c, **zeros)
    moments.add_channels(channels, x, geo)
    blocks = expected.reshape(geo.groups, c, geo.offsets, c, geo.offsets)
    torch.testing.assert_close(moments.mirror(channels), torch.einsum("gcidi->gcd", blocks) / geo.offsets, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(moments.natural_order(moments.mean_patches(x, geo), geo, 1), a.mean(3), rtol=1e-12, atol=1e-12)
    rows, columns = geo.positions((size[0] + sum(geo.padding[2:]), size[1] + sum(geo.padding[:2])))
    every = torch.arange(rows * columns)
    at = moments.unfold_at(geo.pad(x), geo, every // columns, every % columns)
    torch.testing.assert_close(at, moments.unfold(geo.pad(x), geo, rows, columns))


def test_pixels_count_once_and_equal_channels_inside():
    geo, x = geometry(nn.Conv2d(3, 4, 3, padding=1)), randn(2, 3, 6, 5)
    total = torch.zeros(1, 3, 3, dtype=torch.float64)
    moments.add_channels(total, x, geo, pixels=True)
    torch.testing.assert_close(total[0], torch.einsum("bchw,bdhw->cd", x, x))
    # without a border every pixel is covered by all nine offsets
    padded, both = geometry(nn.Conv2d(3, 4, 3, padding=2)), torch.zeros(1, 3, 3, dtype=torch.float64)
    moments.add_channels(both, x, padded)
    torch.testing.assert_close(both[0], torch.einsum("bchw,bdhw->cd", x, x))


def test_chunks_of_any_size_give_the_same_sums(monkeypatch):
    geo, x = geometry(nn.Conv2d(4, 4, 3, padding=1)), randn(5, 4, 9, 9)
    results = []
    for chunk_bytes, length in ((48 * 2**20, 2**15), (1, 40), (10**5, 7)):
        monkeypatch.setattr(moments, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(moments, "SUM_LENGTH", length)
        total, sums = torch.zeros(1, 36, 36, dtype=torch.float64), torch.zeros(1, 36, dtype=torch.float64)
        moments.add_patches(total, sums, x, geo)
        results.append((moments.mirror(total), sums))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("size", [300, 257])
def test_blocks_above_the_diagonal_are_enough(size):
    x, total = randn(2, size, 20), torch.zeros(2, size, size, dtype=torch.float64)
    moments.add_gram(total, x)
    torch.testing.assert_close(moments.mirror(total), x @ x.transpose(1, 2))


def test_float32_products_summed_in_float64_keep_a_small_eigenvalue():
    """A spectrum from 1 to 1e-4 of a float32 input with many rows: the smallest eigenvalue survives to a per cent."""
    q = torch.linalg.qr(randn(6, 6))[0]
    x = (randn(400_000, 6, seed=1) * torch.logspace(0, -2, 6, dtype=torch.float64)) @ q.T
    total = torch.zeros(1, 6, 6, dtype=torch.float64)
    moments.add_rows(total, None, x.float())
    exact = torch.linalg.eigvalsh(x.T @ x)
    torch.testing.assert_close(torch.linalg.eigvalsh(total[0]), exact, rtol=1e-2, atol=0)


def test_half_types_are_summed_in_float32():
    x = torch.full((70_000, 1), 1.0, dtype=torch.bfloat16)
    total, sums = torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    moments.add_rows(total, sums, x)
    assert total.item() == sums.item() == 70_000
