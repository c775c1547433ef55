"""A small residual network and its channel groups written down by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Member:
    parameter: str
    dim: int
    indices: torch.Tensor
    role: str


@dataclass
class Group:
    name: str
    size: int
    members: list[Member]
    prunable: bool = True
    reason: str = ""


@dataclass
class Graph:
    groups: list[Group] = field(default_factory=list)


class Net(nn.Module):
    """conv1-bn1-relu, a residual block (conv2-bn2-relu-conv3-bn3), 2x2 pooling, flatten, linear."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.pool, self.linear = nn.ReLU(inplace), nn.AdaptiveAvgPool2d(2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = x + self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        return self.linear(self.pool(x).flatten(1))


def make_net(inplace: bool = True, seed: int = 0) -> Net:
    """The network in float64, train mode, with unequal BatchNorm parameters and statistics, and every ReLU open for some positions."""
    generator = torch.Generator().manual_seed(seed)
    net = Net(inplace).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = module.weight.data.abs() + 0.5
            module.bias.data = module.bias.data.abs()
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net


def make_graph() -> Graph:
    """The groups of `Net`: the residual stream (two producers, a flattened reader), the block's inside, the pinned output."""
    def one(name, dim, size, role):
        return Member(name, dim, torch.arange(size)[:, None], role)

    def norm(name, size):
        return [one(f"{name}.{part}", 0, size, "param") for part in ("weight", "bias", "running_mean", "running_var")]

    stream = [one("conv1.weight", 0, 4, "out"), one("conv1.bias", 0, 4, "param"), *norm("bn1", 4), one("conv2.weight", 1, 4, "in"),
              one("conv3.weight", 0, 4, "out"), one("conv3.bias", 0, 4, "param"), *norm("bn3", 4),
              Member("linear.weight", 1, torch.arange(16).reshape(4, 4), "in")]
    inside = [one("conv2.weight", 0, 6, "out"), *norm("bn2", 6), one("conv3.weight", 1, 6, "in")]
    output = [one("linear.weight", 0, 5, "out"), one("linear.bias", 0, 5, "param")]
    return Graph([Group("conv1.weight", 4, stream), Group("conv2.weight", 6, inside),
                  Group("linear.weight", 5, output, False, "output of the network")])


def make_batches(sizes=(4, 4, 3), seed: int = 1):
    """Batches of (images [n, 3, 6, 6] float64, labels)."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64), torch.randint(5, (n,), generator=generator)) for n in sizes]
