"""Views, permutations, slices, splits, shuffles and paddings of the channel dimension."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.siblings import own
from tests.compress.graph.micro.base import Net, case, conv


@case(free="a b")
def concat_flatten_linear():
    return Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1).flatten(1)), a=conv(3, 4), b=conv(3, 5), c=nn.Linear(9 * 36, 4))


@case(free="a b")
def flatten_concat_linear():
    return Net(lambda m, x: m.c(torch.cat([m.a(x).flatten(1), m.b(x).flatten(1)], 1)), a=conv(3, 4), b=conv(3, 5), c=nn.Linear(9 * 36, 4))


@case(free="a")
def nhwc_reshape_linear():
    return Net(lambda m, x: m.c(F.relu(m.a(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1)), a=conv(3, 8), c=nn.Linear(8 * 36, 4))


@case(free="a")
def constant_flatten():
    return Net(lambda m, x: m.c(torch.flatten(m.a(x), 1)), a=conv(3, 8), c=nn.Linear(8 * 36, 4))


@case(pinned={"a": "view"})
def view_with_a_constant_width():
    return Net(lambda m, x: m.c(m.a(x).view(-1, 8 * 36)), a=conv(3, 8), c=nn.Linear(8 * 36, 4))


def shuffled(y: Tensor, groups: int) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@case(free="a b")
def channel_shuffle_by_views():
    return Net(lambda m, x: m.c(F.relu(m.b(shuffled(F.relu(m.a(x)), 2)))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 4))


@case(free="a")
def channel_shuffle_module():
    return Net(lambda m, x: m.c(m.s(F.relu(m.a(x)))), a=conv(3, 12), s=nn.ChannelShuffle(3), c=conv(12, 4))


@case(pinned={"a": "view"})
def shuffle_with_constants():
    return Net(lambda m, x: m.c(m.a(x).view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6)), a=conv(3, 8), c=conv(8, 4))


@case(free="a")
def flip():
    return Net(lambda m, x: m.c(m.a(x).flip(1)), a=conv(3, 8), c=conv(8, 4))


@case(free="a")
def roll():
    return Net(lambda m, x: m.c(m.a(x).roll(3, 1)), a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "roll"})
def roll_by_a_share():
    def forward(m, x):
        y = m.a(x)
        return m.c(y.roll(y.shape[1] // 2, 1))

    return Net(forward, a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "aten.index"})
def index_by_a_constant():
    return Net(lambda m, x: m.c(m.a(x)[:, m.order]), a=conv(3, 8), order=torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]), c=conv(8, 4))


@case(pinned={"a": "aten.gather"})
def gather():
    def forward(m, x):
        y = m.a(x)
        return m.c(y.gather(1, m.order.view(1, 8, 1, 1).expand(x.shape[0], 8, 6, 6)))

    return Net(forward, a=conv(3, 8), order=torch.arange(7, -1, -1), c=conv(8, 4))


@case(pinned={"a": "split"})
def split_by_constants():
    def forward(m, x):
        p, q = m.a(x).split((3, 5), 1)
        return m.c(p) + m.d(q)

    return Net(forward, a=conv(3, 8), c=conv(3, 4), d=conv(5, 4))


@case(free="a b")
def slice_of_the_front():
    return Net(lambda m, x: m.c(F.relu(m.a(x))[:, :4]) + m.d(m.b(x)[:, 5:]), a=conv(3, 12), b=conv(3, 9), c=conv(4, 4), d=conv(4, 4))


@case(free="a")
def slice_by_a_share():
    def forward(m, x):
        y = F.relu(m.a(x))
        half = y.shape[1] // 2
        return m.c(y[:, :half] * y[:, half:])

    return Net(forward, a=conv(3, 12), c=conv(6, 4))


@case(free="a")
def slice_assigned_in_place():
    def forward(m, x):
        y = F.relu(m.a(x))
        y[:, :3] *= 2
        return m.c(y)

    return Net(forward, a=conv(3, 8), c=conv(8, 4))


@case((4, 3, 6, 6), free="a")
def temporal_shift():
    def forward(m, x):
        y = m.a(x)
        fold = y.shape[1] // 4
        z = torch.zeros_like(y)
        z[:-1, :fold] = y[1:, :fold]
        z[1:, fold:2 * fold] = y[:-1, fold:2 * fold]
        z[:, 2 * fold:] = y[:, 2 * fold:]
        return m.c(z)

    return Net(forward, a=conv(3, 8), c=conv(8, 4))


@case(free="a")
def chunk_gate():
    def forward(m, x):
        p, q = m.a(x).chunk(2, 1)
        return m.c(p * q.sigmoid())

    return Net(forward, a=conv(3, 12), c=conv(6, 4))


@case(free="a")
def glu():
    return Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 12), c=conv(6, 4))


@case(free="a b d")
def c2f():
    def forward(m, x):
        parts = list(F.silu(m.a(x)).chunk(2, 1))
        for layer in (m.b, m.d):
            parts.append(F.silu(layer(parts[-1])))
        return m.c(torch.cat(parts, 1))

    return Net(forward, a=conv(3, 12), b=conv(6, 6), d=conv(6, 6), c=conv(24, 4))


@case(free="a")
def pixel_shuffle():
    return Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 16), c=conv(4, 4))


@case(free="a")
def pixel_unshuffle():
    return Net(lambda m, x: m.c(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 6), c=conv(24, 4))


@case(free="a")
def pixel_shuffle_by_views():
    def forward(m, x):
        y = m.a(x)
        n, c, h, w = y.shape
        return m.c(y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2))

    return Net(forward, a=conv(3, 16), c=conv(4, 4))


@case(free="a b")
def zero_pad_shortcut():
    def forward(m, x):
        y = F.relu(m.a(x))
        return m.c(F.relu(F.pad(y, (0, 0, 0, 0, 2, 2)) + m.b(y)))

    return Net(forward, a=conv(3, 6), b=conv(6, 10), c=conv(10, 4))


@case(free="a b")
def zero_pad_module():
    layers = importlib.import_module(f"{own('models').__name__}.layers")

    def forward(m, x):
        y = F.relu(m.a(x))
        return m.c(F.relu(m.s(y) + m.b(y)))

    return Net(forward, a=conv(3, 4), s=layers.PadShortcut(4, 12, 2), b=conv(4, 12, stride=2), c=conv(12, 4))
