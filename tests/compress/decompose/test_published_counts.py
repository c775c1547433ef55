"""Oracle: the counts of the EigenDamage table's network that its authors' code and a flop counter give."""

import torch

from compress.cost import count
from compress.decompose.targets import targets
from compress.siblings import own


def test_wide_resnet32_of_the_table():
    net = own("models").build("resnet32x4", 100)
    cost = count(net, torch.zeros(1, 3, 32, 32))
    assert cost.params == 7_451_044
    assert 2 * cost.macs == 2_201_405_440
    # every convolution, the 1x1 shortcuts included, and not the last linear layer
    assert len(targets(net)) == 31 + 2 and len(targets(net, skip_last=False)) == 34
