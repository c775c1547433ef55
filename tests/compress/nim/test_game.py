"""Oracles: the rules of the game replayed weight by weight, brute-force game values, and a chi-square on random removal."""

import functools
import json

import numpy as np
import pytest

from compress.errors import UserError
from compress.nim import METHODS, NimGame, best_move, grundy, nim_sum, players_of, subtraction_grundy
from compress.nim.game import append_moves

SHAPES = {"a": (8, 3, 3), "b": (16, 8, 3), "c": (4, 16)}


def heaps(seed=0):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}


def game(method, weights, **options):
    return NimGame({name: value.size for name, value in weights.items()}, players_of(method), **options)


def test_line_ups():
    assert len(METHODS) == 8
    lines = []
    assert [p.name for p in players_of("1+RANDOM", lines.append)] == ["L1", "RANDOM"] and "L1+RANDOM" in lines[0]
    assert [p.name for p in players_of("MAGNITUDE+L1")] == ["L1", "POSITIVE", "NEGATIVE"]
    with pytest.raises(UserError, match="did you mean 'MAGNITUDE'"):
        players_of("MAGNITUD")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["random", "fixed", "round_robin"])
def test_monotone_capped_logged_and_repeatable(method, order):
    weights = heaps()
    first, second = (game(method, weights, stride=0.02, order=order, seed=3) for _ in range(2))
    before = {name: mask.copy() for name, mask in first.alive.items()}
    for target in (0.1, 0.25, 0.4):
        play = first.play(weights, target)
        assert play == second.play(weights, target) and not play.exhausted
        assert all(np.array_equal(first.alive[name], second.alive[name]) for name in before)
        assert all(not (first.alive[name] & ~mask).any() for name, mask in before.items())
        before = {name: mask.copy() for name, mask in first.alive.items()}
        assert target <= play.sparsity == first.sparsity
        for name, mask in before.items():
            size, players = mask.size, len(first.players)
            assert first.heaps[name] == mask.sum()
            assert (size - mask.sum()) / size <= target + players * max(1, round(0.02 * size)) / size
    other = game(method, weights, stride=0.02, order=order, seed=4)
    other.play(weights, 0.4)
    if "RANDOM" in method:
        assert any(not np.array_equal(other.alive[name], first.alive[name]) for name in before)


def test_l1_alone_keeps_the_largest_of_every_layer():
    weights = heaps()
    played = game("L1", weights, stride=1)
    played.play(weights, 0.5)
    for name, value in weights.items():
        kept = int(played.alive[name].sum())
        largest = np.sort(np.abs(value).ravel())[len(value.ravel()) - kept :]
        assert np.array_equal(np.sort(np.abs(value).ravel()[played.alive[name]]), largest)


def test_magnitude_takes_both_signs_equally_and_smallest_first():
    weights = heaps()
    played = game("MAGNITUDE", weights, stride=3)
    played.play(weights, 0.3)
    for name, value in weights.items():
        gone, flat = ~played.alive[name], value.ravel()
        assert abs((flat[gone] > 0).sum() - (flat[gone] < 0).sum()) <= 3
        assert np.abs(flat[gone & (flat > 0)]).max() < flat[~gone & (flat > 0)].min()


@pytest.mark.parametrize("method", ["L1+RANDOM", "MAGNITUDE+RANDOM", "MAGNITUDE+L1"])
def test_players_take_equal_shares(method):
    weights = heaps()
    played = game(method, weights, stride=2)
    moves = played.play(weights, 0.3).moves
    for name in weights:
        shares = [sum(m.removed for m in moves if m.layer == name and m.player == player.name) for player in played.players]
        assert max(shares) - min(shares) <= 2
    assert sum(m.removed for m in moves) == round(played.sparsity * played.total)


def test_random_removal_is_uniform():
    counts = np.zeros(20)
    for seed in range(400):
        played = NimGame({"a": 20}, players_of("RANDOM"), stride=1, seed=seed)
        played.play({"a": np.arange(20.0)}, 0.25)
        counts += ~played.alive["a"]
    assert counts.sum() == 400 * 5
    # 19 degrees of freedom (variance factor 1 - 5/20 for drawing without replacement): 43.8 is the 0.1 % point.
    assert ((counts - 100) ** 2 / 100).sum() / 0.75 < 43.8


def test_one_sign_runs_dry_and_the_player_passes():
    weights = {"a": np.array([-1.0, -2.0, -3.0, 4.0])}
    play = NimGame({"a": 4}, players_of("POSITIVE"), stride=1).play(weights, 0.75)
    assert play.exhausted and play.sparsity == 0.25
    moves = NimGame({"a": 4}, players_of("MAGNITUDE"), stride=1, order="fixed").play(weights, 0.75).moves
    assert [(m.player, m.low) for m in moves] == [("POSITIVE", 4.0), ("NEGATIVE", -1.0), ("NEGATIVE", -2.0)]


def test_exact_mode_hits_the_count():
    weights = heaps()
    for target in (0.1, 0.333, 0.77):
        played = game("MAGNITUDE+RANDOM", weights, stride=0.05)
        played.play(weights, target, exact=True)
        assert played.total - sum(played.heaps.values()) == int(np.ceil(target * played.total))


def test_round_robin_rotates_and_starts_from_survivors():
    weights = {"a": np.arange(1.0, 13.0)}
    alive = {"a": np.arange(12) >= 2}
    played = NimGame({"a": 12}, players_of("L1+RANDOM"), stride=1, order="round_robin", alive=alive)
    moves = played.play(weights, 0.5).moves
    assert [m.player for m in moves] == ["L1", "RANDOM", "RANDOM", "L1"]
    assert moves[0].low == 3.0 and not played.alive["a"][:2].any()


def test_move_log(tmp_path):
    weights = heaps()
    moves = game("L1", weights, stride=0.1).play(weights, 0.2).moves
    append_moves(tmp_path / "moves.jsonl", moves[:2])
    append_moves(tmp_path / "moves.jsonl", moves[2:])
    rows = [json.loads(line) for line in (tmp_path / "moves.jsonl").read_text().splitlines()]
    assert [row["removed"] for row in rows] == [move.removed for move in moves]
    assert set(rows[0]) == {"step", "round", "layer", "player", "removed", "low", "high"}


def test_bad_games():
    for stride in (0, 1.5, -1, 0.0, 1.0):
        with pytest.raises(UserError, match="stride"):
            NimGame({"a": 3}, players_of("L1"), stride=stride)
    with pytest.raises(UserError, match="order of play"):
        NimGame({"a": 3}, players_of("L1"), order="best")
    with pytest.raises(UserError, match="at least one layer"):
        NimGame({}, players_of("L1"))
    with pytest.raises(UserError, match="at least one player"):
        NimGame({"a": 3}, [])
    with pytest.raises(UserError, match=r"in \[0, 1\), got 90"):
        NimGame({"a": 3}, players_of("L1")).play({"a": np.ones(3)}, 90)


@pytest.mark.parametrize("largest", [1, 2, 3, None])
def test_grundy_against_brute_force(largest):
    @functools.cache
    def wins(position):
        """The player to move wins (the last weight wins)."""
        options = (
            (*position[:i], heap - take, *position[i + 1 :])
            for i, heap in enumerate(position)
            for take in range(1, min(heap, largest or heap) + 1)
        )
        return any(not wins(after) for after in options)

    for a in range(8):
        assert grundy(a, largest) == subtraction_grundy(a, range(1, (largest or a) + 1))
        for b in range(7):
            for c in range(4):
                value = nim_sum(grundy(heap, largest) for heap in (a, b, c))
                assert wins((a, b, c)) == (value != 0)
                if value:
                    index, amount = best_move((a, b, c), largest)
                    after = [a, b, c]
                    after[index] -= amount
                    assert 1 <= amount <= (largest or amount) and not wins(tuple(after))


def test_grundy_of_other_games():
    assert [subtraction_grundy(n, {2, 3}) for n in range(6)] == [0, 0, 1, 1, 2, 0]
    assert best_move((3, 3)) == (0, 1) and best_move((1, 5, 5), 4) == (0, 1)
    with pytest.raises(UserError, match="every heap is empty"):
        best_move((0, 0))
    with pytest.raises(UserError, match="at least 1"):
        grundy(3, 0)
