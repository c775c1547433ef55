"""Convolutions of every kind, sums and concatenations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.compress.graph.micro.base import Net, case, conv


@case(free="a b", pinned={"c": "output"})
def chain():
    return Net(lambda m, x: m.c(F.relu(m.bn(m.b(F.relu(m.a(x)))))), a=conv(3, 8), b=conv(8, 10), bn=nn.BatchNorm2d(10), c=conv(10, 4))


@case(free="a b")
def residual():
    def forward(m, x):
        y = F.relu(m.bn(m.a(x)))
        return m.c(F.relu(y + m.b(y)))

    return Net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(8, 8), c=conv(8, 4))


@case((1, 8, 6, 6), free="a", pinned={"b": "without channels"})
def residual_to_the_input():
    return Net(lambda m, x: m.c(x + m.b(F.relu(m.a(x)))), a=conv(8, 8), b=conv(8, 8), c=conv(8, 4))


@case(free="a b c")
def concat():
    def forward(m, x):
        return m.d(F.relu(m.bn(torch.cat([m.a(x), m.b(x), m.c(x)], 1))))

    return Net(forward, a=conv(3, 4), b=conv(3, 6), c=conv(3, 5), bn=nn.BatchNorm2d(15), d=conv(15, 4))


@case(free="a")
def concat_with_the_input():
    return Net(lambda m, x: m.c(torch.cat([x, m.a(x)], 1)), a=conv(3, 6), c=conv(9, 4))


@case(free="a b c")
def concat_into_grouped():
    def forward(m, x):
        return m.d(F.relu(m.c(torch.cat([m.a(x), m.b(x)], 1))))

    return Net(forward, a=conv(3, 4), b=conv(3, 8), c=conv(12, 12, groups=3), d=conv(12, 4))


@case(free="a b c")
def two_group_counts():
    return Net(lambda m, x: m.d(torch.cat([m.b(m.a(x)), m.c(m.a(x))], 1)), a=conv(3, 24),
               b=conv(24, 24, groups=3), c=conv(24, 24, groups=4), d=conv(48, 4))


@case(pinned={"a": "one must stay"})
def two_coprime_group_counts():
    return Net(lambda m, x: m.d(torch.cat([m.b(m.a(x)), m.c(m.a(x))], 1)), a=conv(3, 12),
               b=conv(12, 12, groups=3), c=conv(12, 12, groups=4), d=conv(24, 4))


@case(free="a b")
def grouped():
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 12, groups=2), c=conv(12, 4))


@case(free="a b")
def depthwise():
    return Net(lambda m, x: m.c(F.relu(m.bn(m.b(m.a(x))))), a=conv(3, 8), b=conv(8, 8, groups=8), bn=nn.BatchNorm2d(8), c=conv(8, 4, 1))


@case(free="a b")
def depthwise_with_multiplier():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 6), b=conv(6, 12, groups=6), c=conv(12, 4, 1))


@case(free="a b")
def groups_with_one_output_each():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 12), b=conv(12, 4, groups=4), c=conv(4, 4, 1))


@case(pinned={"b": "fixed input"})
def depthwise_on_the_input():
    return Net(lambda m, x: m.c(m.b(x)), b=conv(3, 3, groups=3), c=conv(3, 4, 1))


@case(free="a b")
def transposed():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 6), b=nn.ConvTranspose2d(6, 8, 2, 2), c=conv(8, 4))


@case(free="a b")
def transposed_grouped():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 2, 2, groups=2), c=conv(12, 4))


@case(free="a b")
def transposed_depthwise():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), c=conv(8, 4))


@case(free="a")
def transposed_depthwise_with_multiplier():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 16, 2, 2, groups=8), c=conv(16, 4))
