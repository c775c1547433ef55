"""Oracle: the 18 published sparsities of the VGG-16 runs and the last lines of four run logs."""

import pytest

from tests.compress.nim.legacy import VGG16, percent_mean

PUBLISHED = [
    0.05555764222756411, 0.10185567741720084, 0.15741331964476493, 0.20366244845920134, 0.2591222779363649, 0.3053388025006677,
    0.3515553270649706, 0.40698907314202726, 0.4531729934561965, 0.5085936978331997, 0.5547776181473691, 0.6008963299612714,
    0.656219221587874, 0.7023216312767094, 0.7576445229033121, 0.8036165155916133, 0.8587829068175749, 0.9047548995058763,
]  # fmt: skip


def test_published_list_is_in_percent():
    assert sum(VGG16) == 14_710_464
    values, zeros = percent_mean(VGG16, [lambda n: round(0.0001 * n)], skip=False)
    assert values == pytest.approx(PUBLISHED, abs=1e-12)
    assert sum(zeros) == 143_488 and zeros[0] == 0


@pytest.mark.parametrize(
    "moves,final",
    [
        ([lambda n: max(1, round(0.001 * n))], 0.9754093963536101),  # L1, RANDOM
        ([lambda n: max(1, int(0.001 * n))], 0.9610080990696225),  # POSITIVE, NEGATIVE
        ([lambda n: max(1, int(0.0005 * n))] * 2, 0.9859894755219462),  # MAGNITUDE
        ([lambda n: round(0.0005 * n)] * 2, 0.9813498907279425),  # L1+RANDOM
    ],
)
def test_final_values_of_four_logs(moves, final):
    assert percent_mean(VGG16, moves, skip=True)[0][-1] == pytest.approx(final, abs=1e-12)


def test_eighteen_steps_from_the_published_settings():
    assert int(0.95 / 0.05) == 18
