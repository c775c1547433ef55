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


@settings(max_examples=200, deadline=None)
@given(menus, st.integers(0, 120), st.sampled_from([1, 7, 10**7, 0.25, 1 / 3]))
def test_the_choice_is_the_best_one_under_one_budget_in_any_unit(raw, limit, unit):
    options = [[Option(loss, (a * unit,)) for loss, a, _ in menu] for menu in raw]
    feasible = [choice for choice in product(*(range(len(menu)) for menu in options)) if sum(m[i][1] for m, i in zip(raw, choice)) <= limit]
    if not feasible:
        with pytest.raises(UserError):
            knapsack(options, [limit * unit])
        return
    chosen = knapsack(options, [limit * unit * (1 + 1e-12)])
    assert tuple(chosen) in feasible
    # exact where the costs have a common divisor, else short of the limit by less than a unit per layer
    below = [choice for choice in feasible if unit >= 1 or sum(m[i][1] for m, i in zip(raw, choice)) <= limit - 1e-4 * limit] or [tuple(chosen)]
    assert sum(m[i].loss for m, i in zip(options, chosen)) <= min(sum(m[i].loss for m, i in zip(options, choice)) for choice in below)


def test_large_costs_waste_less_than_a_unit_per_layer():
    generator = torch.Generator().manual_seed(0)
    costs = [[0, *torch.randint(1, 10**9, (3,), generator=generator).tolist()] for _ in range(7)]
    losses = torch.rand(7, 4, generator=generator).double()
    losses[:, 0] = 2.0
    options = [[Option(float(loss), (float(cost),)) for loss, cost in zip(row, given)] for row, given in zip(losses, costs)]
    every = [(sum(c[i] for c, i in zip(costs, choice)), sum(o[i].loss for o, i in zip(options, choice))) for choice in product(range(4), repeat=7)]
    for limit in (5e8, 1.5e9, 3e9):
        chosen = knapsack(options, [limit])
        assert sum(c[i] for c, i in zip(costs, chosen)) <= limit
        assert sum(o[i].loss for o, i in zip(options, chosen)) <= min(loss for cost, loss in every if cost <= limit * (1 - 7e-5)) + 1e-12


def test_many_layers_alike_are_no_difficulty():
    menu = [Option(0.0, (1000.5,)), *(Option((12 - r) ** 2 / 7, (60.25 * r,)) for r in range(1, 12))]
    assert sum(menu[i].costs[0] for i in knapsack([menu] * 60, [18000.0])) <= 18000


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
    assert knapsack([[Option(1.0, (1.0, 1.0)), Option(0.0, (3.0, 1.0))]], [3.0, 1.0]) == [1]
    with pytest.raises(UserError):
        knapsack([[Option(1.0, (9.0, 1.0))]], [3.0, 1.0])
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
