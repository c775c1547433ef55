"""Parameters used without a module, normalisations, embeddings of position, parametrised weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.compress.graph.micro.base import Net, case, conv


@case(pinned={"a": "two activations", "b": "two activations"})
def bilinear_product():
    def forward(m, x):
        p, q = m.a(x).flatten(2), m.b(x).flatten(2)
        return m.c(torch.bmm(p.transpose(1, 2), q))

    return Net(forward, a=conv(3, 6), b=conv(3, 6), c=nn.Linear(36, 4))


@case((1, 3, 6, 6), free="p t a b")
def mixer():
    def forward(m, x):
        y = m.p(x).flatten(2)
        y = y + m.u(F.gelu(m.t(y)))
        y = y.transpose(1, 2)
        return m.c((y + m.b(F.gelu(m.a(y)))).mean(1))

    return Net(forward, p=conv(3, 8), t=nn.Linear(36, 10), u=nn.Linear(10, 36), a=nn.Linear(8, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 4))


@case((1, 3, 4, 4), free="p t a")
def mixer_with_as_many_tokens_as_channels():
    def forward(m, x):
        y = m.p(x).flatten(2)
        y = y + m.u(F.gelu(m.t(y)))
        y = y.transpose(1, 2)
        return m.c((y + m.b(F.gelu(m.a(y)))).mean(1))

    return Net(forward, p=conv(3, 16), t=nn.Linear(16, 16), u=nn.Linear(16, 16), a=nn.Linear(16, 16),
               b=nn.Linear(16, 16), c=nn.Linear(16, 4))


@case(free="a w")
def einsum_with_a_parameter():
    return Net(lambda m, x: m.c(torch.einsum("bchw,oc->bohw", m.a(x), m.w)), a=conv(3, 6), w=nn.Parameter(torch.randn(8, 6)), c=conv(8, 4))


@case(free="a w")
def functional_convolution():
    return Net(lambda m, x: m.c(F.relu(F.conv2d(m.a(x), m.w, m.v, padding=1))), a=conv(3, 6), w=nn.Parameter(torch.randn(8, 6, 3, 3)),
               v=nn.Parameter(torch.randn(8)), c=conv(8, 4))


@case(pinned={"a": "group", "w": "group"})
def functional_depthwise():
    return Net(lambda m, x: m.c(F.conv2d(m.a(x), m.w, groups=6)), a=conv(3, 6), w=nn.Parameter(torch.randn(6, 1, 3, 3)), c=conv(6, 4))


@case((2, 5), free="a w")
def matrix_parameter():
    return Net(lambda m, x: m.c(F.relu(m.a(x)) @ m.w), a=nn.Linear(5, 6), w=nn.Parameter(torch.randn(6, 8)), c=nn.Linear(8, 4))


@case((2, 3, 5), free="a")
def matrix_parameter_from_the_left():
    return Net(lambda m, x: m.c(m.w @ F.relu(m.a(x))), a=nn.Linear(5, 6), w=nn.Parameter(torch.randn(4, 3)), c=nn.Linear(6, 4))


@case(pinned={"a": "layer_norm"})
def layer_norm_over_everything():
    return Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 6), n=nn.LayerNorm([6, 6, 6]), c=conv(6, 4))


@case((2, 5), pinned={"a": "layer_norm"}, free="h")
def layer_norm():
    return Net(lambda m, x: m.c(m.n(m.a(F.gelu(m.h(x))))), h=nn.Linear(5, 9), a=nn.Linear(9, 8), n=nn.LayerNorm(8), c=nn.Linear(8, 4))


@case((2, 5), pinned={"a": "mean"})
def rms_norm():
    return Net(lambda m, x: m.c(m.n(m.a(x))), a=nn.Linear(5, 8), n=nn.RMSNorm(8), c=nn.Linear(8, 4))


@case(free="a")
def group_norm():
    return Net(lambda m, x: m.c(F.relu(m.n(m.a(x)))), a=conv(3, 12), n=nn.GroupNorm(4, 12), c=conv(12, 4))


@case(free="a")
def group_norm_without_parameters():
    return Net(lambda m, x: m.c(F.relu(m.n(m.a(x)))), a=conv(3, 12), n=nn.GroupNorm(4, 12, affine=False), c=conv(12, 4))


@case(pinned={"a": "group_norm"})
def functional_group_norm():
    return Net(lambda m, x: m.c(F.group_norm(m.a(x), 4)), a=conv(3, 12), c=conv(12, 4))


@case((2, 3, 6, 6), free="a b")
def instance_norm():
    return Net(lambda m, x: m.c(m.p(m.b(m.n(m.a(x))))), a=conv(3, 6), n=nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
               b=conv(6, 8), p=nn.InstanceNorm2d(8), c=conv(8, 4))


@case(free="a")
def frozen_batch_norm():
    from torchvision.ops import FrozenBatchNorm2d

    return Net(lambda m, x: m.c(F.relu(m.n(m.a(x)))), a=conv(3, 8), n=FrozenBatchNorm2d(8), c=conv(8, 4))


@case(free="a")
def channel_buffer():
    return Net(lambda m, x: m.c(m.a(x) * m.scale), a=conv(3, 8), scale=torch.rand(8, 1, 1) + 0.5, c=conv(8, 4))


@case(free="a")
def position_embedding():
    return Net(lambda m, x: m.c(F.relu(m.a(x) + m.e)), a=conv(3, 8), e=nn.Parameter(torch.randn(1, 8, 6, 6)), c=conv(8, 4))


@case(free="a")
def position_embedding_with_equal_sides():
    return Net(lambda m, x: m.c(F.relu(m.a(x) + m.e)), a=conv(3, 6), e=nn.Parameter(torch.randn(1, 6, 6, 6)), c=conv(6, 4))


@case(free="a")
def layer_scale():
    return Net(lambda m, x: m.c(m.g * m.a(x)), a=conv(3, 8), g=nn.Parameter(torch.rand(8, 1, 1)), c=conv(8, 4))


@case(free="a")
def weight_norm():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=parametrizations.weight_norm(conv(3, 8)), c=conv(8, 4))


@case((2, 5), pinned={"a": "aten."})
def spectral_norm():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=parametrizations.spectral_norm(nn.Linear(5, 8)), c=nn.Linear(8, 4))


@case(free="a")
def prune_masks():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=prune.random_unstructured(conv(3, 8), "weight", 0.5),
               c=prune.random_unstructured(conv(8, 4), "weight", 0.5))


@case(free="a h")
def position_bias_from_a_small_network():
    """A bias that layers compute from a table of coordinates, without the input."""
    return Net(lambda m, x: m.c(F.relu(m.a(x) + m.o(F.relu(m.h(m.table))).T.unflatten(1, (6, 6)))), a=conv(3, 8), table=torch.rand(36, 2),
               h=nn.Linear(2, 10), o=nn.Linear(10, 8), c=conv(8, 4))
