"""Tiny float64 networks and data for the curvature tests."""

import torch
from torch import nn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convnet(seed=0, in_place=True):
    """Padding, stride, dilation, groups, bias, batch normalisation."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(in_place),
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.ReLU(in_place),
        nn.Conv2d(6, 4, 2, stride=2, bias=False),
        nn.ReLU(in_place),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    net[1].running_mean.copy_(randn(4, seed=seed) * 0.2)
    net[1].running_var.copy_(randn(4, seed=seed + 1).square() + 0.5)
    return net


def plain_convnet(seed=0):
    """What other packages understand: no groups, no in-place operators."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(5 * 9, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def mlp(seed=0, widths=(4, 6, 5, 3), activation=nn.ReLU):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()
