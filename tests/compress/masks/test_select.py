"""Oracle: sorting all pairs (score, position) in Python; properties on random scores (hypothesis)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.masks import Block, NofM, VectorBlock, keep_count, parse_pattern, select
from compress.masks.patterns import from_matrix, to_matrix
from compress.masks.select import kth_lowest


def full(scores):
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


def sorted_oracle(scores, masks, kept):
    """Removes pruned positions first, then the lowest, earlier position first among equals."""
    ranked = []
    for layer, (name, score) in enumerate(scores.items()):
        for position, (value, alive) in enumerate(zip(score.flatten().tolist(), masks[name].flatten().tolist(), strict=True)):
            ranked.append((alive, value, layer, position, name))
    ranked.sort(key=lambda row: row[:4])
    new = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    for *_, position, name in ranked[len(ranked) - kept :]:
        new[name][position] = True
    return {name: mask.reshape(scores[name].shape) & masks[name] for name, mask in new.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 1.0), st.booleans(), st.booleans())
def test_exact_counts_ties_and_nesting(seed, sizes, density, tied, local):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randn(size, generator=generator, dtype=torch.float64) for i, size in enumerate(sizes)}
    if tied:
        scores = {name: score.round() for name, score in scores.items()}
    masks = {name: torch.rand(len(score), generator=generator) < 0.8 for name, score in scores.items()}
    pool = "local" if local else "global"
    new = select(scores, masks, density, pool=pool, allow_empty=True)
    assert all(bool((mask <= masks[name]).all()) for name, mask in new.items())
    parts = [[name] for name in scores] if local else [list(scores)]
    for names in parts:
        total, alive = sum(scores[n].numel() for n in names), sum(int(masks[n].sum()) for n in names)
        kept = min(alive, keep_count(density, total))
        assert sum(int(new[n].sum()) for n in names) == kept
        expected = sorted_oracle({n: scores[n] for n in names}, {n: masks[n] for n in names}, kept)
        assert all(torch.equal(expected[n], new[n]) for n in names)


@pytest.mark.parametrize(
    "density,total,kept", [(1.0, 7, 7), (0.1, 10, 1), (0.1, 850_976, 85_098), (0.3, 10, 3), (1e-9, 10, 1), (0.5, 3, 2), (1 - 0.9, 10, 1)]
)
def test_keep_count(density, total, kept):
    assert keep_count(density, total) == kept


def test_density_one_is_identity_and_sparser_pools_stay():
    scores = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    masks = {"a": torch.tensor([True, False, False, False]), "b": torch.ones(4, dtype=torch.bool)}
    assert all(torch.equal(mask, masks[name]) for name, mask in select(scores, masks, 1.0).items())
    new = select(scores, masks, 0.5, pool="local")
    assert torch.equal(new["a"], masks["a"]) and new["b"].tolist() == [False, False, True, True]


def test_protected_weights():
    scores = {"a": torch.tensor([1.0, torch.inf, 2.0, torch.inf])}
    assert select(scores, full(scores), None)["a"].tolist() == [False, True, False, True]
    assert select(scores, full(scores), 0.75)["a"].tolist() == [False, True, True, True]
    with pytest.raises(UserError, match="the lowest it reaches is 0.5000"):
        select(scores, full(scores), 0.25)


def test_empty_layer_is_refused_unless_allowed():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    with pytest.raises(UserError, match="every weight of 'a'"):
        select(scores, full(scores), 0.5)
    assert select(scores, full(scores), 0.5, allow_empty=True)["a"].tolist() == [False, False]
    assert select(scores, full(scores), 0.5, pool="local")["a"].tolist() == [False, True]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), 90])
def test_density_outside_range(density):
    scores = {"a": torch.ones(3)}
    with pytest.raises(UserError, match=r"in \(0, 1\]"):
        select(scores, full(scores), density)


def test_matrix_view_round_trip():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert to_matrix(weight)[0, :4].tolist() == [0, 4, 8, 1]
    assert torch.equal(from_matrix(to_matrix(weight), weight.shape), weight)


@pytest.mark.parametrize("shape", [(4, 8), (6, 8, 3, 3)])
def test_n_of_m(shape):
    scores = {"a": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    mask = select(scores, full(scores), None, pattern=NofM(2, 4))["a"]
    groups = to_matrix(mask).reshape(-1, 4)
    assert torch.equal(groups.sum(1), torch.full((len(groups),), 2))
    values = to_matrix(scores["a"]).reshape(-1, 4)
    assert bool((values.masked_fill(~groups, torch.inf).min(1).values >= values.masked_fill(groups, -torch.inf).max(1).values).all())
    assert NofM(2, 4).mask(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)).tolist() == [[True, True, False, False]]
    stem = {"a": torch.randn(4, 3, 3, 3)}
    assert bool(select(stem, full(stem), 0.5, pattern=NofM(2, 4))["a"].all())
    with pytest.raises(UserError, match="has density 0.5, but 0.3"):
        select(scores, full(scores), 0.3, pattern=NofM(2, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.floats(0.1, 1.0))
def test_blocks_are_whole_and_counted(seed, c_out, c_in, rows, cols, density):
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(c_out, c_in, 3, 1, generator=generator), "b": torch.rand(c_out, c_in, generator=generator)}
    pattern = Block(rows, cols)
    masks = select(scores, full(scores), density, pattern=pattern, allow_empty=True)
    total, kept = sum(s.numel() for s in scores.values()), sum(int(m.sum()) for m in masks.values())
    wanted = keep_count(density, total)
    assert kept == total if wanted == total else (wanted - rows * cols < kept <= wanted or kept <= rows * cols)
    for mask in masks.values():
        matrix = to_matrix(mask)
        for r in range(0, matrix.shape[0], rows):
            for c in range(0, matrix.shape[1], cols):
                assert matrix[r : r + rows, c : c + cols].unique().numel() == 1


def test_vector_block_shares_columns():
    scores = {"a": torch.rand(128, 16, 3, 3, generator=torch.Generator().manual_seed(0))}
    mask = to_matrix(select(scores, full(scores), 0.25, pattern=VectorBlock(64))["a"])
    for half in (mask[:64], mask[64:]):
        assert bool((half == half[0]).all())
    value = to_matrix(scores["a"]).reshape(2, 64, -1).mean(1)
    kept = torch.stack([mask[0], mask[64]])
    assert int(kept.sum()) == 72 and float(value[kept].min()) >= float(value[~kept].max())


def test_patterns_by_name():
    assert [parse_pattern(name).name for name in ("unstructured", "2:4", "block-16x8", "vector-64")] == [
        "unstructured",
        "2:4",
        "block-16x8",
        "block-64x1",
    ]
    for wrong in ("2:", "block-4", "vector-0", "diagonal"):
        with pytest.raises(UserError, match="Unknown mask pattern"):
            parse_pattern(wrong)
    with pytest.raises(UserError, match="1 <= n <= m"):
        parse_pattern("5:4")
    with pytest.raises(UserError, match="at least 2 dimensions"):
        select({"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.bool)}, 0.5, pattern=Block(2, 2))


@pytest.mark.parametrize("kind", ["normal", "tied", "ordered", "infinite"])
def test_kth_lowest_of_large_tensors(kind):
    values = torch.randn(1_200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "tied":
        values = values.round()
    elif kind == "ordered":
        values = values.sort().values ** 3
    elif kind == "infinite":
        values[::2] = torch.inf
    ordered = values.sort().values
    for count in (1, 2, 5_000, 600_000, 600_001, 1_199_000, 1_200_000):
        assert kth_lowest(values, count) == ordered[count - 1]
