"""Oracle: one image at a time, cropped by slicing and mirrored by flipping; statistics by float64 mean and std."""

import pytest
import torch
import torch.nn.functional as F

from compress.data.draws import derive_seed, derived_generator
from compress.data.transforms import Draws, Transform, channel_statistics, crop_and_flip, draw, in_grey_levels, normalise


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("shape", [(5, 1, 4, 6), (3, 3, 7, 7)])
def test_the_gather_equals_slicing_and_flipping_each_image(padding, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    draws = draw(shape[0], Transform((0.5,), (0.5,), padding, True), torch.Generator().manual_seed(1))
    result = crop_and_flip(images, draws, padding)
    height, width = shape[2:]
    for number, image in enumerate(images):
        top, left = int(draws.top[number]), int(draws.left[number])
        expected = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        assert torch.equal(result[number], expected.flip(-1) if draws.mirrored[number] else expected)


def test_draws_cover_all_corners_and_half_are_mirrored():
    draws = draw(4000, Transform((0.5,), (0.5,), 2, True), torch.Generator().manual_seed(0))
    for corner in (draws.top, draws.left):
        share = torch.bincount(corner, minlength=5) / 4000
        assert len(share) == 5 and (share - 0.2).abs().max() < 0.03
    assert abs(draws.mirrored.double().mean() - 0.5) < 0.03
    assert torch.corrcoef(torch.stack([draws.top, draws.left]).double())[0, 1].abs() < 0.06


def test_settings_that_are_off_leave_the_images_alone():
    images = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8)
    draws = draw(6, Transform((0.5,), (0.5,), 0, False), torch.Generator().manual_seed(0))
    assert torch.equal(crop_and_flip(images, draws, 0), images)
    part = Draws(draws.top, draws.left, draws.mirrored)[2:4]
    assert len(part.top) == 2


def test_normalised_images_have_mean_zero_and_deviation_one():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 3
    mean, std = channel_statistics(images)
    values = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), values.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), values.std((0, 2, 3), unbiased=False), rtol=1e-9, atol=0)
    x = normalise(images, in_grey_levels(mean, images.device), in_grey_levels(std, images.device))
    assert x.dtype == torch.float32
    expected = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_constant_channel_is_not_divided_by_zero():
    assert channel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)) == (pytest.approx((0.2,)), (1.0,))


def test_streams_differ_by_every_key_and_are_the_same_again():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a", 1, 0)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=derived_generator(0, "a")), torch.rand(3, generator=derived_generator(0, "a")))
    # The value is part of the promise that a run can be repeated with a later version.
    assert derive_seed(0, "epoch", 1) == 8267552663497258805
