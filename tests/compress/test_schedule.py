"""Oracles: the published formulas written out, and the step rates of the gradual pruning study."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.schedule import SCHEDULES, explicit, learning_rate, sparsity_at, step_rates, targets


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 30), st.floats(0, 0.999), st.floats(0, 1))
def test_monotone_and_exact_end(name, steps, final, share):
    start = final * share
    values = targets(name, steps, final, start)
    assert values[-1] == final and len(values) == steps
    assert all(a <= b + 1e-12 for a, b in zip([start, *values], values, strict=False))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 20), st.floats(0.01, 0.99), st.floats(0, 0.9))
def test_step_rates_compose(name, steps, final, share):
    start = final * share
    rates = step_rates(sorted(targets(name, steps, final, start)), start)
    assert (1 - start) * math.prod(1 - rate for rate in rates) == pytest.approx(1 - final, rel=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_formulas(t):
    s_i, s_f = 0.2, 0.9
    at = lambda name: sparsity_at(name, t, s_f, s_i)
    assert at("linear") == pytest.approx(s_i + (s_f - s_i) * t, abs=1e-15)
    assert at("geometric") == pytest.approx(1 - math.exp((1 - t) * math.log(1 - s_i) + t * math.log(1 - s_f)), abs=1e-15)
    assert at("cubic") == pytest.approx(s_f + (s_i - s_f) * (1 - t) ** 3, abs=1e-15)
    assert at("cosine") == pytest.approx(s_f + (s_i - s_f) * (1 + math.cos(math.pi * t)) / 2, abs=1e-15)
    one_cycle = s_i + (s_f - s_i) * (1 + math.exp(-14 + 6)) / (1 + math.exp(-14 * t + 6))
    assert at("one_cycle") == pytest.approx(one_cycle, abs=1e-15)
    assert at("one_shot") == (s_f if t > 0 else s_i)


def test_published_step_rates():
    # 90 % in 8, 4, 2 and 1 prunes of a constant share of the survivors.
    for steps, rate in ((8, 0.2501), (4, 0.4377), (2, 0.6838), (1, 0.9)):
        assert step_rates(targets("geometric", steps, 0.9)) == pytest.approx([rate] * steps, abs=5e-5)
    study = explicit([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    assert step_rates(study)[1] == pytest.approx(1 - 0.8 / 0.9) and step_rates(study)[-1] == pytest.approx(0.5)
    assert sparsity_at("one_cycle", 0.0, 0.9) / 0.9 == pytest.approx(0.0025, abs=1e-4)


def test_synflow_density_curve():
    assert [1 - s for s in targets("geometric", 4, 0.99)] == pytest.approx([0.01 ** (k / 4) for k in (1, 2, 3, 4)])


def test_learning_rates():
    assert [learning_rate("multistep", t) for t in (0.0, 0.49, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert [learning_rate("multistep", t, milestones=(0.3, 0.6, 0.8), gamma=0.2) for t in (0.3, 0.9)] == pytest.approx([0.2, 0.008])
    assert [learning_rate("cosine", t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert [learning_rate("one_cycle", t) for t in (0, 0.1, 1)] == pytest.approx([0.1, 1.0, 0.001])
    assert learning_rate("constant", 0.7) == 1.0
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        learning_rate("cosin", 0.1)


def test_bad_schedules():
    with pytest.raises(UserError, match="did you mean 'cubic'"):
        sparsity_at("cubik", 0.5, 0.9)
    for final, start in ((1.0, 0.0), (0.5, 0.6), (-0.1, 0.0)):
        with pytest.raises(UserError, match="0 <= start <= final < 1"):
            sparsity_at("linear", 0.5, final, start)
    for values in ([], [0.5, 0.4], [0.5, 1.0]):
        with pytest.raises(UserError, match="non-decreasing list"):
            explicit(values)
    with pytest.raises(UserError, match="at least 1 step"):
        targets("linear", 0, 0.5)
