"""Recurrent layers, gates, reductions over channels, resizing, selections by data."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.compress.graph.micro.base import Net, case, conv


@case((2, 7, 5), free="a")
def lstm():
    return Net(lambda m, x: m.c(m.r(F.relu(m.a(x)))[0]), a=nn.Linear(5, 6), r=nn.LSTM(6, 8, batch_first=True), c=nn.Linear(8, 4))


@case((2, 7, 5), free="a")
def gru():
    return Net(lambda m, x: m.c(m.r(F.relu(m.a(x)))[0]), a=nn.Linear(5, 6), r=nn.GRU(6, 8, batch_first=True), c=nn.Linear(8, 4))


@case((2, 5), free="a b")
def linear_view_transposed():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x).view(x.shape[0], -1, 2, 2)))), a=nn.Linear(5, 32),
               b=nn.ConvTranspose2d(8, 6, 2, 2), c=conv(6, 4))


@case((2, 3, 6, 6), free="a")
def optional_second_argument():
    return Net(lambda m, x, y=None: m.c(m.a(x) if y is None else m.a(x) + y), a=conv(3, 8), c=conv(8, 4))


@case(free="f a b")
def selective_kernel():
    def forward(m, x):
        stacked = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.e(F.relu(m.f(stacked.sum(1).mean((2, 3)))))
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return m.c((stacked * weights).sum(1))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), f=nn.Linear(8, 6), e=nn.Linear(6, 16), c=conv(8, 4))


@case((2, 3, 6, 6), free="a b")
def checkpointed():
    return Net(lambda m, x: m.c(checkpoint(lambda y: F.relu(m.b(y)), m.a(x), use_reentrant=True)), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))


@case(free="a f")
def squeeze_excite():
    def forward(m, x):
        y = F.relu(m.bn(m.a(x)))
        return m.c(y * torch.sigmoid(m.e(F.relu(m.f(F.adaptive_avg_pool2d(y, 1))))))

    return Net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(8), f=conv(8, 4, 1), e=conv(4, 8, 1), c=conv(8, 4))


@case(free="a f")
def squeeze_excite_with_views():
    def forward(m, x):
        y = F.relu(m.a(x))
        n, c = y.shape[:2]
        gate = torch.sigmoid(m.e(F.relu(m.f(y.mean((2, 3)).view(n, c))))).view(n, c, 1, 1)
        return m.c(y * gate.expand_as(y))

    return Net(forward, a=conv(3, 8), f=nn.Linear(8, 4), e=nn.Linear(4, 8), c=conv(8, 4))


@case(free="a")
def spatial_attention_expanded():
    def forward(m, x):
        y = m.a(x)
        return m.c(y * m.d(x).sigmoid().expand(-1, y.shape[1], -1, -1))

    return Net(forward, a=conv(3, 8), d=conv(3, 1), c=conv(8, 4))


@case(pinned={"a": "amax"})
def maximum_over_channels():
    return Net(lambda m, x: m.c(m.a(x)) * m.a(x).amax(1, keepdim=True), a=conv(3, 8), c=conv(8, 4))


@case(free="a b")
def prelu_and_odd_activations():
    return Net(lambda m, x: m.c(F.softplus(m.b(m.p(m.a(x)))).cos()), a=conv(3, 8), p=nn.PReLU(8), b=conv(8, 6), c=conv(6, 4))


@case(free="a b")
def dropouts():
    return Net(lambda m, x: m.c(m.q(m.b(m.p(m.a(x))))), a=conv(3, 8), p=nn.Dropout2d(0.5), b=conv(8, 6), q=nn.Dropout(0.5), c=conv(6, 4))


@case(pinned={"a": "softmax"})
def softmax_over_channels():
    return Net(lambda m, x: m.c(m.a(x).softmax(1)), a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "vector_norm"})
def normalised_channels():
    return Net(lambda m, x: m.c(F.normalize(m.a(x), dim=1)), a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "aten."})
def local_response_norm():
    return Net(lambda m, x: m.c(F.local_response_norm(m.a(x), 3)), a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "cumsum"})
def running_sum_over_channels():
    return Net(lambda m, x: m.c(m.a(x).cumsum(1)), a=conv(3, 8), c=conv(8, 4))


@case(pinned={"a": "no rule"})
def unknown_operator():
    return Net(lambda m, x: m.c(torch.cdist(m.a(x).flatten(2).mT, m.w).mT.unflatten(2, (6, 6))), a=conv(3, 8),
               w=nn.Parameter(torch.randn(5, 8)), c=conv(5, 4))


@case(free="a b")
def resized():
    return Net(lambda m, x: m.c(F.interpolate(m.b(F.interpolate(m.a(x), scale_factor=2.0, mode="bilinear")), size=3)), a=conv(3, 8),
               b=conv(8, 6), c=conv(6, 4))


@case(free="a b")
def reflected_and_pooled():
    return Net(lambda m, x: m.c(F.avg_pool2d(m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect"), 2)), 2)), a=conv(3, 8),
               b=conv(8, 6), c=conv(6, 4))


@case((2, 7), integers=9, free="e a")
def embedding_and_conv1d():
    return Net(lambda m, x: m.c(F.relu(m.a(m.e(x).transpose(1, 2))).amax(2)), e=nn.Embedding(9, 8), a=nn.Conv1d(8, 6, 3), c=nn.Linear(6, 4))


@case((1, 2, 4, 4, 4), free="a")
def conv3d():
    return Net(lambda m, x: m.c(F.avg_pool3d(m.n(m.a(x)), 2)), a=nn.Conv3d(2, 6, 3, padding=1), n=nn.BatchNorm3d(6), c=nn.Conv3d(6, 4, 1))


@case(free="a b")
def dictionary_output():
    return Net(lambda m, x: {"p": m.c(m.b(m.a(x))), "q": [m.d(m.a(x))]}, a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), d=conv(8, 4))


@case(free="a")
def weight_standardised():
    def forward(m, x):
        w = m.a.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return m.c(F.relu(F.conv2d(x, w, m.a.bias, padding=1)))

    return Net(forward, a=conv(3, 8), c=conv(8, 4))


@case(free="a")
def where_and_compare():
    def forward(m, x):
        y = m.a(x)
        return m.c(torch.where(y > 0.1, y, y * y).clamp(-1, 1).masked_fill(y < -0.5, 0.0))

    return Net(forward, a=conv(3, 8), c=conv(8, 4))


@case(free="a")
def repeated_channels():
    return Net(lambda m, x: m.c(m.a(x).repeat(1, 2, 1, 1)) + m.d(m.a(x).repeat_interleave(3, 1)), a=conv(3, 6),
               c=conv(12, 4), d=conv(18, 4))


@case(free="a")
def unfolded():
    return Net(lambda m, x: m.c(F.unfold(m.a(x), 2).mT), a=conv(3, 6), c=nn.Linear(24, 4))


@case((2, 5), free="a")
def low_rank_update():
    return Net(lambda m, x: m.c(F.linear(F.relu(m.a(x)), m.w + m.u @ m.v)), a=nn.Linear(5, 8), w=nn.Parameter(torch.randn(6, 8)),
               u=nn.Parameter(torch.randn(6, 3)), v=nn.Parameter(torch.randn(3, 8)), c=nn.Linear(6, 4))


@case((2, 5), pinned={"a": "trilinear", "b": "trilinear"})
def bilinear_layer():
    return Net(lambda m, x: m.c(m.d(m.a(x), m.b(x))), a=nn.Linear(5, 6), b=nn.Linear(5, 7), d=nn.Bilinear(6, 7, 8), c=nn.Linear(8, 4))


@case(free="a b")
def data_dependent_branch():
    def forward(m, x):
        y = F.relu(m.a(x))
        return m.c(m.b(y) if float(x.sum()) == float(x.sum()) else y)

    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))


@case(free="a", pinned={"d": "index"})
def boolean_selection():
    def forward(m, x):
        y = m.a(x)
        return m.c(y), m.d(x)[m.d(x) > 0].sum()

    return Net(forward, a=conv(3, 8), c=conv(8, 4), d=conv(3, 6))


@case(free="a")
def built_by_pieces():
    def forward(m, x):
        y = F.relu(m.a(x))
        n, c, h, w = y.shape
        z = y.new_zeros(n, 2 * c, h, w)
        z[:, :c] = y
        z[:, c:] = -y
        return m.c(z)

    return Net(forward, a=conv(3, 6), c=conv(12, 4))


@case(pinned={"a": "differs from the masked original"})
def width_in_the_arithmetic():
    def forward(m, x):
        y = m.a(x)
        return m.c(y / y.shape[1])

    return Net(forward, a=conv(3, 8), c=conv(8, 4))
