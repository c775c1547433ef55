"""Oracle: loops over samples with autograd on the layers of a residual stream, whose shares add up."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.criteria import CRITERIA
from tests.compress.criteria.nets import make_batches, make_graph, make_net


def shares(net, layer):
    """E_n sum_t |z dL/dz| of each of the layer's channels, divided by its sum."""
    kept, total = [], 0
    module = net.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, out: kept.append(out))
    for images, labels in make_batches():
        for x, y in zip(images, labels):
            loss = cross_entropy(net(x[None]), y[None])
            z = kept.pop()
            total = total + (torch.autograd.grad(loss, z)[0] * z.detach()).abs().sum((0, 2, 3))
    handle.remove()
    return total / total.sum()


@pytest.mark.parametrize("options, scale", [({}, 1), ({"aggregate": "sum"}, 1), ({"aggregate": "mean"}, 0.5)])
def test_the_score_of_a_stream_is_the_sum_over_its_layers(options, scale):
    net = make_net(inplace=False).eval()
    expected = scale * (shares(net, "conv1") + shares(net, "conv3"))
    ours = CRITERIA["taylor"].score(make_graph(), make_net(), make_batches(), cross_entropy, **options)["conv1.weight"]
    torch.testing.assert_close(ours, expected)
