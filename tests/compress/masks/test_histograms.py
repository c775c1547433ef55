"""Oracle: numpy.histogram, and the numbers of weights before and kept after pruning."""

import copy

import numpy as np
import torch
from torch import nn

from compress.masks import Masks, prune
from compress.masks.histograms import BINS, weight_histograms


def test_counts_are_those_of_numpy_over_a_common_range():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    masks = Masks.attach(copy.deepcopy(before))
    prune(masks, "magnitude", 0.3)
    with torch.no_grad():  # as if trained on: the kept weights leave the range of the old ones
        for name in masks.names:
            masks.parameter(name).mul_(1.7)
    found = weight_histograms(masks, before)
    assert list(found) == masks.names
    for name, mask in masks.items():
        old, kept = before.get_parameter(name).detach().double().numpy(), masks.parameter(name).detach()[mask].double().numpy()
        panel = found[name]
        assert (panel["low"], panel["high"]) == (min(old.min(), kept.min()), max(old.max(), kept.max()))
        for values, counts in ((old, panel["before"]), (kept, panel["after"])):
            assert sum(counts) == values.size and len(counts) == BINS
            expected = np.histogram(values, BINS, (panel["low"], panel["high"]))[0]
            # A value on an edge may fall to either side.
            assert np.abs(np.cumsum(expected) - np.cumsum(counts)).max() <= 1


def test_an_empty_layer_and_a_constant_one():
    before = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    nn.init.constant_(before[1].weight, 0.25)
    masks = Masks.attach(copy.deepcopy(before))
    masks.update({"0.weight": torch.zeros(3, 4, dtype=torch.bool)})
    found = weight_histograms(masks, before)
    assert sum(found["0.weight"]["after"]) == 0 and sum(found["0.weight"]["before"]) == 12
    assert found["1.weight"]["low"] < 0.25 < found["1.weight"]["high"] and sum(found["1.weight"]["after"]) == 6
