"""Random networks for property tests: residual, concat, grouped, depthwise, shuffle, squeeze-excite, shared layers, padded shortcuts.

`RandomNet(seed)` draws a program of blocks. The forward pass reads sizes from its tensors only, as a well-written network does.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("conv", "residual", "bottleneck", "concat", "dense", "grouped", "depthwise", "shuffle", "excite", "shared", "padded", "gate",
         "transposed", "group_norm", "two_heads")


def norm(rng: random.Random, channels: int) -> nn.Module:
    """BatchNorm, PReLU or nothing."""
    return rng.choice([nn.BatchNorm2d, nn.PReLU, lambda _: nn.Identity()])(channels)


def activation(rng: random.Random) -> nn.Module:
    """Some of them are not zero at zero."""
    return rng.choice([nn.ReLU(), nn.SiLU(inplace=True), nn.GELU(), nn.Sigmoid(), nn.Hardswish(), nn.Softplus(), nn.LeakyReLU(0.1)])


class Block(nn.Module):
    """One block of the given kind, `[n, c, h, w] -> [n, c', h, w]`; `self.width` is c'."""

    def __init__(self, kind: str, rng: random.Random, c: int) -> None:
        super().__init__()
        self.kind, self.width = kind, c
        self.act = activation(rng)
        hidden = rng.choice([4, 6, 8, 12])

        def conv(a: int, b: int, k: int = 3, **options: int) -> nn.Sequential:
            bias = rng.random() < 0.5
            return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=bias, **options), norm(rng, b))

        if kind == "conv":
            self.width = rng.choice([6, 8, 12])
            self.a = conv(c, self.width)
        elif kind in ("residual", "shared"):
            self.a, self.b = conv(c, c if kind == "shared" else hidden), conv(c if kind == "shared" else hidden, c)
        elif kind == "bottleneck":
            self.width = rng.choice([8, 12])
            self.a, self.b, self.c, self.d = conv(c, hidden, 1), conv(hidden, hidden), conv(hidden, self.width, 1), conv(c, self.width, 1)
        elif kind == "concat":
            self.a, self.b = conv(c, 4), conv(c, 6, 1)
            self.width = 10
        elif kind == "dense":
            self.a = conv(c, 4)
            self.width = c + 4
        elif kind == "grouped":
            groups = rng.choice([2, 3])
            self.a, self.b = conv(c, 4 * groups), conv(4 * groups, 2 * groups * rng.choice([1, 2]), groups=groups)
            self.width = self.b[0].out_channels
        elif kind == "depthwise":
            multiplier = rng.choice([1, 2])
            self.a, self.b, self.c = conv(c, hidden, 1), conv(hidden, hidden * multiplier, groups=hidden), conv(hidden * multiplier, c, 1)
        elif kind == "shuffle":
            self.groups = rng.choice([2, 3])
            self.a, self.b = conv(c, 4 * self.groups), conv(4 * self.groups, 4 * self.groups, groups=rng.choice([1, self.groups]))
            self.width = 4 * self.groups
        elif kind == "excite":
            self.a, self.squeeze, self.excite = conv(c, c), nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        elif kind == "padded":
            self.extra = rng.choice([2, 4])
            self.width = c + self.extra
            self.a = conv(c, self.width)
        elif kind == "gate":
            self.a = conv(c, 16)
            self.width = 8
        elif kind == "transposed":
            groups = rng.choice([1, 2])
            self.a = conv(c, 8)
            self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=groups)
            self.width = 8
        elif kind == "group_norm":
            self.a, self.n = conv(c, 12), nn.GroupNorm(rng.choice([4, 6, 12]), 12)
            self.width = 12
        elif kind == "two_heads":
            self.a, self.b = conv(c, hidden), conv(hidden, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        act = self.act
        if self.kind == "conv":
            return act(self.a(x))
        if self.kind == "residual":
            return act(x + self.b(act(self.a(x))))
        if self.kind == "shared":
            return act(self.b(act(self.a(act(self.a(x))))) + x)
        if self.kind == "bottleneck":
            return act(self.c(act(self.b(act(self.a(x))))) + self.d(x))
        if self.kind == "concat":
            return act(torch.cat([self.a(x), self.b(x)], 1))
        if self.kind == "dense":
            return torch.cat([x, act(self.a(x))], 1)
        if self.kind in ("grouped", "depthwise"):
            y = act(self.b(act(self.a(x))))
            return y if self.kind == "grouped" else x + self.c(y)
        if self.kind == "shuffle":
            y = act(self.a(x))
            n, c, h, w = y.shape
            return act(self.b(y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)))
        if self.kind == "excite":
            y = act(self.a(x))
            return y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        if self.kind == "padded":
            return act(F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)) + self.a(x))
        if self.kind == "gate":
            p, q = self.a(x).chunk(2, 1)
            return p * torch.sigmoid(q)
        if self.kind == "transposed":
            return F.max_pool2d(act(self.up(act(self.a(x)))), 2)
        if self.kind == "group_norm":
            return act(self.n(self.a(x)))
        y = act(self.a(x))
        return self.b(y) + self.b(y.flip(2)) * 0.5


class RandomNet(nn.Module):
    """Stem, three to six blocks, and a head that flattens or averages; `[n, 3, 6, 6] -> [n, 5]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.stem = nn.Conv2d(3, rng.choice([6, 8]), 3, padding=1)
        width, blocks = self.stem.out_channels, []
        for position in range(rng.randint(3, 6)):
            kind = KINDS[(seed + 4 * position) % len(KINDS)] if position < 2 else rng.choice(KINDS)
            blocks.append(Block(kind, rng, width))
            width = blocks[-1].width
        self.blocks = nn.Sequential(*blocks)
        self.flat = rng.random() < 0.5
        self.head = nn.Linear(width * 9 if self.flat else width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = F.avg_pool2d(x, 2)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))
