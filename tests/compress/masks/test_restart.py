"""Oracles: the snapshot that was taken, and the variance of the published initialisation."""

import copy
import math

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.masks import Masks, prune
from compress.masks.restart import reinitialize, rewind, scratch, scratch_b_epochs, shuffle, snapshot
from tests.compress.saliency.networks import chain


def pruned(density=0.3, seed=0):
    model = chain(torch.Generator().manual_seed(seed), bias=True)
    before = snapshot(model)
    masks = Masks.attach(model)
    prune(masks, "magnitude", density)
    return model, masks, before


def test_rewind_restores_survivors_only():
    model, masks, before = pruned()
    kept = masks.snapshot()
    with torch.no_grad():
        for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            value.add_(1.0)
    rewind(masks, before)
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value * kept[name] if name in kept else value)
    assert all(torch.equal(masks[name], mask) for name, mask in kept.items())
    model.get_buffer("1.running_mean").add_(1.0)
    rewind(masks, before, buffers=False)
    assert torch.equal(model.get_buffer("1.running_mean"), before["1.running_mean"] + 1.0)
    with pytest.raises(UserError, match="'0.weight' is missing"):
        rewind(masks, {})


def test_reinitialize_takes_another_draw_under_the_same_mask():
    model, masks, before = pruned()
    fresh = chain(torch.Generator().manual_seed(7), bias=True)
    state = copy.deepcopy(fresh.state_dict())
    kept = masks.snapshot()
    reinitialize(masks, fresh)
    assert all(torch.equal(masks[name], mask) and torch.equal(masks.parameter(name), state[name] * mask) for name, mask in kept.items())
    assert torch.equal(model.get_parameter("0.bias"), state["0.bias"]) and not torch.equal(state["0.bias"], before["0.bias"])


def test_scratch_variance():
    model, other = (nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64)) for _ in range(2))
    masks = Masks.attach(model)
    prune(masks, "random", 0.25, generator=torch.Generator().manual_seed(0))
    scratch(masks, other, torch.Generator().manual_seed(1))
    weight, mask = masks.parameter("0.weight").detach(), masks["0.weight"]
    kept = int(mask.sum())
    assert kept == 64 * 32 * 9 // 4 and bool((weight[~mask] == 0).all()) and bool((weight[mask] != 0).all())
    # The standard error of a standard deviation from k samples is sigma / sqrt(2 k).
    sigma = math.sqrt(2 * 32 / kept)
    assert abs(float(weight[mask].std()) - sigma) < 4 * sigma / math.sqrt(2 * kept)
    first = weight.clone()
    scratch(masks, other, torch.Generator().manual_seed(1))
    assert torch.equal(first, masks.parameter("0.weight"))


def test_scratch_b_budget():
    assert [scratch_b_epochs(160, 10, n) for n in (10, 5, 3, 2.5)] == [160, 320, 533, 640]
    with pytest.raises(UserError, match="Scratch-B needs"):
        scratch_b_epochs(160, 10, 0)


def test_shuffle_keeps_layer_density():
    _, masks, before = pruned()
    kept, density = masks.snapshot(), masks.layer_density()
    shuffle(masks, torch.Generator().manual_seed(3))
    assert masks.layer_density() == density
    assert all(not torch.equal(masks[name], mask) for name, mask in kept.items())
    rewind(masks, before)
    assert all(torch.equal(masks.parameter(name) != 0, mask) for name, mask in masks.items())
    moved = masks.snapshot()
    masks.replace(kept)
    shuffle(masks, torch.Generator().manual_seed(3))
    assert all(torch.equal(masks[name], mask) for name, mask in moved.items())
