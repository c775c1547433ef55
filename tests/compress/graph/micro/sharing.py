"""Ties, shared modules, branches without gradient, attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.compress.graph.micro.base import Net, case, conv


@case((2, 7), integers=9, free="a")
def tied_embedding_and_head():
    table = nn.Embedding(9, 8)
    head = nn.Linear(8, 9, bias=False)
    head.weight = table.weight
    return Net(lambda m, x: m.head(F.relu(m.a(m.e(x)))), e=table, a=nn.Linear(8, 8), head=head)


@case(free="a")
def module_used_twice():
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.b(m.a(x)))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))


@case(free="a b")
def head_shared_by_two_levels():
    def forward(m, x):
        p = F.relu(m.a(x))
        return m.c(p), m.c(F.relu(m.b(F.max_pool2d(p, 2))))

    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))


@case(free="a")
def shared_after_a_split():
    def forward(m, x):
        p, q = m.a(x).chunk(2, 1)
        return m.c(p) + m.c(F.relu(q))

    return Net(forward, a=conv(3, 12), c=conv(6, 4))


@case(free="a b")
def branch_without_gradient():
    def forward(m, x):
        y = F.relu(m.a(x))
        with torch.no_grad():
            z = m.b(y.detach())
        return m.c(y) * (m.d(z) > 0)

    return Net(forward, a=conv(3, 8), b=conv(8, 6), c=conv(8, 4), d=conv(6, 4))


@case((2, 5, 8), pinned={"h": "aten."}, free="f")
def multihead_attention():
    def forward(m, x):
        y = x + m.h(x, x, x, need_weights=False)[0]
        return m.c(F.gelu(m.f(y)))

    return Net(forward, h=nn.MultiheadAttention(8, 2, batch_first=True), f=nn.Linear(8, 12), c=nn.Linear(12, 4))


def attend(m, x, heads: int, kv_heads: int | None = None):
    n, t, _ = x.shape
    q = m.q(x).view(n, t, heads, -1).transpose(1, 2)
    k, v = (layer(x).view(n, t, kv_heads or heads, -1).transpose(1, 2) for layer in (m.k, m.v))
    if kv_heads:
        k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    return m.c(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


@case((2, 5, 8), free="v", pinned={"q": "two activations", "k": "two activations"})
def attention():
    return Net(lambda m, x: attend(m, x, 2), q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), c=nn.Linear(8, 4))


@case((2, 5, 8), free="v", pinned={"q": "two activations", "k": "two activations"})
def grouped_query_attention():
    return Net(lambda m, x: attend(m, x, 4, 2), q=nn.Linear(8, 16), k=nn.Linear(8, 8), v=nn.Linear(8, 8), c=nn.Linear(16, 4))


@case((2, 5, 8), pinned={"q": "aten."})
def fused_qkv():
    def forward(m, x):
        n, t, _ = x.shape
        q, k, v = m.q(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return m.c(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8))

    return Net(forward, q=nn.Linear(8, 24), c=nn.Linear(8, 4))
