"""Oracle: the dense matrix itself; unpacking must return it bit for bit, and exactly the kept entries may be addressed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import formats
from kernels.two_four import reference as two_four

from .masks import PATTERNS, masked

LINEAR = ("run16", "vector_block", "sparse_conv", "two_four", "compact", "csr")
VARIANTS = {
    "run16": st.fixed_dictionaries({"coding": st.sampled_from((0, 1))}),
    "csr": st.just({}),
    "two_four": st.just({}),
    "compact": st.just({}),
    "sparse_conv": st.fixed_dictionaries({"height": st.sampled_from((16, 64)), "step": st.sampled_from((16, 32))}),
    "vector_block": st.fixed_dictionaries({"height": st.sampled_from((16, 32, 64)), "step": st.sampled_from((16, 32))}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(0, 70)), draw(st.sampled_from((0, 1, 15, 16, 17, 64, 257, 1100)))
    pattern, sparsity = draw(st.sampled_from(PATTERNS)), draw(st.sampled_from((0.0, 0.5, 0.9, 0.995, 1.0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return masked(rows, columns, sparsity, pattern, generator).to(draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), weight=matrices())
def test_unpack_returns_the_same_bits(name, data, weight):
    weight = weight[:, : weight.shape[1] // 4 * 4].contiguous() if name == "two_four" else weight
    packed = formats.pack(name, weight, **data.draw(VARIANTS[name]))
    places = formats.positions(packed)
    addressed = places[places < weight.numel()].sort().values
    assert torch.equal(bits(formats.unpack(packed)), bits(weight))
    assert torch.equal(addressed, (weight.reshape(-1) != 0).nonzero().reshape(-1))
    assert packed.kept == int((weight != 0).sum())


@pytest.mark.parametrize("name", LINEAR)
def test_a_mask_keeps_zero_valued_weights_trainable(name):
    weight = torch.zeros(20, 400)
    mask = torch.rand(20, 400) < 0.2
    packed = formats.pack(name, weight, mask)
    places = formats.positions(packed)
    assert torch.equal(places[places < weight.numel()].sort().values, mask.reshape(-1).nonzero().reshape(-1))


@pytest.mark.parametrize("name", LINEAR)
def test_nan_and_infinite_weights_are_kept(name):
    weight = torch.zeros(5, 40)
    weight[1, 3], weight[4, 39], weight[0, 0] = float("nan"), float("inf"), -1.5
    assert torch.equal(bits(formats.unpack(formats.pack(name, weight))), bits(weight))


def test_run16_gaps_beyond_a_byte_and_columns_beyond_16_bits():
    for columns in (65536, 65537, 100_000):
        weight = torch.zeros(3, columns)
        weight[0, [0, 1, 299, 600, columns - 1]] = torch.arange(1.0, 6.0)
        weight[2, columns - 1] = 7.0
        for coding in (0, 1):
            packed = formats.pack("run16", weight, coding=coding)
            assert packed.index[0].dtype == (torch.int32 if columns > 65536 else torch.int16)
            assert torch.equal(formats.unpack(packed), weight)


def test_run16_bytes_match_the_format_document():
    """The cost model of kernels/run16/README.md: 21 bits per stored entry in nibbles, 25 in bytes, plus padding."""
    generator = torch.Generator().manual_seed(3)
    for sparsity, coding, low, high in ((0.5, 0, 21, 22), (0.9, 1, 25, 27)):
        weight = masked(1024, 2048, sparsity, "random", generator).bfloat16()
        packed = formats.pack("run16", weight, coding=coding)
        assert low <= 8 * packed.bytes / packed.kept <= high


def test_vector_block_streams_only_kept_vectors():
    generator = torch.Generator().manual_seed(4)
    weight = masked(128, 8192, 0.8, "blocks", generator, height=64).bfloat16()
    packed = formats.pack("vector_block", weight, height=64)
    dense = weight.numel() * 2
    assert packed.bytes == pytest.approx(dense * 0.2 * (1 + 32 / (16 * 64)), rel=0.08)


@pytest.mark.parametrize("name", LINEAR)
def test_a_tensor_that_is_no_matrix_is_refused(name):
    with pytest.raises(ValueError, match="a matrix is needed"):
        formats.pack(name, torch.ones(2, 2, 2))


def test_sparse_conv_packs_taps_in_torch_order():
    for channels, kernel, group in ((16, (3, 3), 16), (8, (5, 1), 8), (5, (2, 3), 1)):
        weight = masked(40, channels * kernel[0] * kernel[1], 0.9, "blocks", torch.Generator().manual_seed(1))
        packed = formats.pack("sparse_conv", weight, kernel=kernel)
        assert packed.options[0] == group and torch.equal(formats.unpack(packed), weight)
    with pytest.raises(ValueError, match="cannot be packed for a kernel of 3 x 3 in groups of 16"):
        formats.pack("sparse_conv", torch.ones(4, 72), kernel=(3, 3), group=16)


def test_two_four_takes_the_two_largest_of_every_four():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, 5.0, 0.0]])
    packed = formats.pack("two_four", weight)
    assert packed.index[0].tolist() == [[1, 3, 4, 2]] or packed.index[0].tolist() == [[1, 3, 2, 4]]
    s, remainder = two_four.parts(packed.values, packed.index)
    assert sorted(s[0].tolist()) == [-4.0, 0.0, 3.0, 5.0] and sorted(remainder[remainder != 0].tolist()) == [1.0, 2.0]
    with pytest.raises(ValueError, match="multiple of 4"):
        formats.pack("two_four", torch.ones(2, 6))


@pytest.mark.parametrize("sparsity, share", [(0.5, 0.094), (0.7, 0.0231), (0.9, 0.0010)])
def test_two_four_leaves_the_expected_remainder(sparsity, share):
    """With p = 1 - sparsity, four positions leave E[max(0, Binomial(4, p) - 2)] / 4 = p^3 (1 - p) + p^4 / 2 for R."""
    p = 1 - sparsity
    assert p**3 * (1 - p) + p**4 / 2 == pytest.approx(share, rel=0.2)
    weight = masked(512, 1024, sparsity, "random", torch.Generator().manual_seed(9))
    packed = formats.pack("two_four", weight)
    in_s = int((packed.index[0] < 4).sum())
    assert (packed.kept - in_s) / weight.numel() == pytest.approx(p**3 * (1 - p) + p**4 / 2, rel=0.1)


def test_compact_is_a_bitmap_and_the_values():
    weight = masked(64, 640, 0.8, "random", torch.Generator().manual_seed(8)).bfloat16()
    assert formats.pack("compact", weight).bytes == weight.numel() // 8 + 2 * int((weight != 0).sum()) + 8 * 65


def test_unknown_format_and_block_height_are_refused():
    with pytest.raises(ValueError, match="not one of"):
        formats.pack("bitmap", torch.ones(2, 2))
    with pytest.raises(ValueError, match="power of two"):
        formats.pack("vector_block", torch.ones(2, 2), height=24)
