"""A small residual network and data for the network-level decomposition tests."""

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """Stem, two convolutions with a strided 1x1 shortcut, a hidden and a last linear layer."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.b = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.short = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.hidden, self.head = nn.Linear(2 * width, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(self.b(functional.relu(self.a(x))) + self.short(x))
        return self.head(functional.relu(self.hidden(x.mean((2, 3)))))


def network(seed=0, width=8):
    torch.manual_seed(seed)
    net = Residual(width).double().eval()
    net.norm.running_var.uniform_(0.5, 2)
    return net


def batches(images=12, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)
    return [(x[: images // 2], torch.arange(images // 2) % 4), (x[images // 2:], torch.arange(images - images // 2) % 4)]
