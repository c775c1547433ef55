"""Oracle: enumeration of all choices."""

import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocate.knapsack import Option, knapsack
from compress.errors import UserError

menus = st.lists(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(menus, st.integers(0, 120), st.integers(0, 120))
def test_the_choice_is_the_best_one_under_both_budgets(raw, first, second):
    options = [[Option(loss, (a, b)) for loss, a, b in menu] for menu in raw]
    feasible = [choice for choice in product(*(range(len(menu)) for menu in options))
                if sum(m[i].costs[0] for m, i in zip(options, choice)) <= first and sum(m[i].costs[1] for m, i in zip(options, choice)) <= second]
    if not feasible:
        with pytest.raises(UserError):
            knapsack(options, [first, second])
        return
    chosen = knapsack(options, [first, second])
    assert tuple(chosen) in feasible
    best = min(sum(m[i].loss for m, i in zip(options, choice)) for choice in feasible)
    assert sum(m[i].loss for m, i in zip(options, chosen)) <= best * (1 + 1e-3) + 1e-6


def test_a_large_budget_keeps_every_layer_and_a_tight_one_takes_the_cheapest():
    generator = torch.Generator().manual_seed(0)
    options = [[Option(0.0, (100.0,))] + [Option(1 + float(torch.rand((), generator=generator)), (c,)) for c in (10.0, 20.0)] for _ in range(30)]
    assert knapsack(options, [3000.0]) == [0] * 30
    assert knapsack(options, [300.0]) == [1] * 30


def test_what_the_solver_prints_is_dropped_and_the_output_comes_back(monkeypatch, capfd):
    from compress.allocate import knapsack as module

    plain = module.milp

    def noisy(*arguments, **options):
        os.write(1, b"solver\n")
        return plain(*arguments, **options)

    monkeypatch.setattr(module, "milp", noisy)
    assert knapsack([[Option(1.0, (1.0,)), Option(0.0, (3.0,))]], [3.0]) == [1]
    with pytest.raises(UserError):
        knapsack([[Option(1.0, (9.0,))]], [3.0])
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
