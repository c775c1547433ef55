"""Oracle: torch.optim.lr_scheduler for the schedules, torch's own optimisers stepped by hand for the groups."""

import pytest
import torch
from torch import nn

from compress.config import TrainConfig
from compress.train.optim import learning_rate, make_optimizer

TOTAL, PER_EPOCH = 40, 8


def rates(cfg: TrainConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate(cfg, step, total, PER_EPOCH) for step in range(total)]


def torch_rates(make, lr: float, total: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    result = []
    for _ in range(total):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        ({"schedule": "cosine"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL)),
        (
            {"schedule": "multistep", "milestones": [0.5, 0.75], "gamma": 0.2},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.2),
        ),
        (
            {"schedule": "onecycle"},
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=TOTAL + 1, cycle_momentum=False),
        ),
    ],
)
def test_schedules_are_those_of_torch(settings, make):
    # torch's one-cycle scheduler is stepped once more than there are optimiser steps, hence its extra step and ours below.
    total = TOTAL + 1 if settings["schedule"] == "onecycle" else TOTAL
    mine = rates(TrainConfig(lr=0.3, **settings), total)[:TOTAL]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(torch_rates(make, 0.3)), rtol=1e-5, atol=1e-9)


def test_warm_up_is_linear_and_cosine_starts_at_its_end():
    mine = rates(TrainConfig(lr=0.8, schedule="cosine", warmup_epochs=0.5))
    assert mine[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    oracle = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL - 4), 0.8, TOTAL - 4)
    assert mine[4:] == pytest.approx(oracle, abs=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_rates_of_short_trainings_lie_between_zero_and_the_peak(schedule, total):
    cfg = TrainConfig(lr=0.5, schedule=schedule, warmup_epochs=1.0 if schedule == "cosine" else 0.0)
    assert all(0 < rate <= 0.5 for rate in rates(cfg, total))


def test_decay_can_spare_norms_and_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, decay_norm_and_bias=False))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {id(model[0].weight)}
    assert spared == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias)}


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.999), weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.999), weight_decay=0.01)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.8, weight_decay=0.01)),
    ],
)
def test_optimisers_step_like_those_of_torch(name, oracle):
    start = torch.randn(3, 2)
    mine, other = nn.Linear(2, 3, bias=False), nn.Parameter(start.clone())
    mine.weight.data.copy_(start)
    cfg = TrainConfig(optimizer=name, lr=0.05, momentum=0.8, weight_decay=0.01)
    first, second = make_optimizer(mine, cfg), oracle([other])
    for _ in range(3):
        gradient = torch.randn(3, 2)
        mine.weight.grad, other.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    assert torch.equal(mine.weight, other)
    assert not torch.equal(other, start)
