"""Oracle: dense Fisher matrices from gradients of single images, inverted (whole layer) or cut into one block per channel."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.criteria import CRITERIA
from compress.criteria.woodfisher import spread
from compress.graph import trace
from tests.compress.curvature.nets import randn


class Net(nn.Module):
    """A residual stream that a grouped convolution reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.mid, self.head = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.a(x)))
        return self.head(torch.relu(self.mid(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval()


DATA = [(randn(5, 2, 5, 5), torch.tensor([0, 1, 2, 1, 0])), (randn(3, 2, 5, 5, seed=1), torch.tensor([2, 2, 0]))]
GRAPH_INPUT = randn(1, 2, 5, 5)


def score(net, data=DATA, **options):
    return CRITERIA["woodfisher"].score(
        trace(net, GRAPH_INPUT), net, data, functional.cross_entropy, torch.Generator().manual_seed(0), **options)


def fisher(net, layer, data=DATA, damping=0.01):
    """F = lambda I + X^T X / N over the layer's weight, [p, p]."""
    weight, rows = net.get_submodule(layer).weight, []
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            rows.append(torch.autograd.grad(functional.cross_entropy(net(image[None]), label[None]), weight)[0].flatten())
    X = torch.stack(rows)
    return damping * X.square().mean() * torch.eye(X.shape[1], dtype=X.dtype) + X.T @ X / len(X)


def expected(net, block, side, data=DATA, damping=0.01):
    """Loss of every channel, added over the members of its group, from dense matrices."""
    losses = {}
    for group in trace(net, GRAPH_INPUT).groups:
        members = [m for m in group.members if m.role in side and m.parameter.endswith(".weight")]
        for member in members if group.prunable else ():
            F = fisher(net, member.parameter.removesuffix(".weight"), data, damping)
            w = net.get_parameter(member.parameter).detach()
            places = torch.arange(w.numel()).reshape(w.shape).movedim(member.dim, 0)
            for channel, own in enumerate(member.indices):
                S = places[own].flatten()
                H = F[S][:, S] if block == "channel" else torch.linalg.inv(torch.linalg.inv(F)[S][:, S])
                value = w.flatten()[S] @ H @ w.flatten()[S] / 2
                losses.setdefault(group.name, torch.zeros(group.size, dtype=torch.float64))[channel] += value
    return losses


@pytest.mark.parametrize("block", ["channel", "layer"])
@pytest.mark.parametrize("side, roles", [("producer", ["out"]), ("consumer", ["in"]), ("both", ["out", "in"])])
def test_scores_add_the_losses_under_dense_matrices_over_the_members(net, block, side, roles):
    ours, dense = score(net, block=block, side=side, damping=0.1), expected(net, block, roles, damping=0.1)
    assert ours.keys() == dense.keys() and len(ours) >= 3
    for name, values in ours.items():
        torch.testing.assert_close(values, dense[name])


def test_the_default_is_a_block_per_channel_that_updates_no_weight(net):
    assert all(torch.equal(value, score(net)[name]) for name, value in score(net, block="channel").items())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    graph = trace(net, GRAPH_INPUT)
    CRITERIA["woodfisher"].compensate(graph, net, {"a.weight": [1]}, DATA)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    CRITERIA["woodfisher"].compensate(graph, net, {"a.weight": [1]}, DATA, block="layer")
    assert not torch.equal(net.b.weight, before["b.weight"])


@pytest.mark.parametrize("block", ["channel", "layer"])
def test_images_are_spread_over_the_batches(net, block):
    x, y = (torch.cat(parts) for parts in zip(*DATA))
    chosen = [0, 1, 3, 4, 6]  # floor(8 i / 5)
    limited = score(net, block=block, images=5)
    for name, values in score(net, [(x[chosen], y[chosen])], block=block).items():
        torch.testing.assert_close(limited[name], values)


def test_a_sorted_loader_gives_every_class():
    labels = torch.arange(40) // 4
    batches = [((randn(4, 2), randn(4, 1)), labels[start:start + 4]) for start in range(0, 40, 4)]
    taken = spread(iter(batches), 10)
    assert torch.cat([y for _, y in taken]).tolist() == list(range(10))
    assert all(len(a) == len(b) == len(y) for (a, b), y in taken)
    assert spread(batches, 40) == batches
