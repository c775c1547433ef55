"""Oracle: counting by hand which indices are left."""

import numpy as np
import torch

from compress.graph.counting import Counter
from compress.graph.groups import ChannelGroup
from compress.graph.records import Cost


def test_dimensions_in_which_channels_occur_unequally_often():
    """Classes 0..2 are a group of three; a dimension holds class 0 twice, class 1 once, class 2 never, and one fixed index."""
    component = np.array([0, 1, 2, 3])
    group = ChannelGroup("w", 3, [], components=np.array([0, 1, 2]))
    own, rows = np.array([0, 1, 2]), np.array([0, 3, 1, 0])
    counter = Counter([group], component, {"w": ((3, 5), {0: own})}, [Cost("w", 2, [rows, own, 5])], batch=1)
    assert counter.count({}) == (15, 2 * 4 * 3 * 5)
    assert counter.count({"w": torch.tensor([1, 2])}) == (10, 2 * 2 * 2 * 5)
    assert counter.count({"w": torch.tensor([0, 1])}) == (10, 2 * 4 * 2 * 5)
    assert counter.count({"w": torch.tensor([2])}) == (5, 2 * 1 * 1 * 5)
