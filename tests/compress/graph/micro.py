"""About 90 tiny networks, each with one construct that has broken a pruning tool; the table `CASES` says what must happen to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from compress.siblings import own


class Net(nn.Module):
    """Layers given by name, and a forward function of (net, x)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass
class Case:
    """`free`: layers that must lose channels. `pinned`: layers that must keep theirs, with a word that the reason must contain."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 3, 6, 6)
    free: tuple[str, ...] = ()
    pinned: dict[str, str] = field(default_factory=dict)
    integers: int = 0


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


CASES: dict[str, Case] = {}


def case(shape: tuple[int, ...] = (1, 3, 6, 6), free: str = "", pinned: dict[str, str] | None = None, integers: int = 0) -> Callable:
    def store(function: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[function.__name__] = Case(function, shape, tuple(free.split()), pinned or {}, integers)
        return function

    return store


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
    return Net(lambda m, x: m.d(torch.cat([m.b(m.a(x)), m.c(m.a(x))], 1)), a=conv(3, 24), b=conv(24, 24, groups=3), c=conv(24, 24, groups=4), d=conv(48, 4))


@case(pinned={"a": "one must stay"})
def two_coprime_group_counts():
    return Net(lambda m, x: m.d(torch.cat([m.b(m.a(x)), m.c(m.a(x))], 1)), a=conv(3, 12), b=conv(12, 12, groups=3), c=conv(12, 12, groups=4), d=conv(24, 4))


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
    layers = own("models.layers") if False else __import__(f"{own('models').__name__}.layers", fromlist=["PadShortcut"])

    def forward(m, x):
        y = F.relu(m.a(x))
        return m.c(F.relu(m.s(y) + m.b(y)))

    return Net(forward, a=conv(3, 4), s=layers.PadShortcut(4, 12, 2), b=conv(4, 12, stride=2), c=conv(12, 4))


@case(pinned={"a": "two activations", "b": "two activations"})
def bilinear_product():
    def forward(m, x):
        p, q = m.a(x).flatten(2), m.b(x).flatten(2)
        return m.c(torch.bmm(p.transpose(1, 2), q))

    return Net(forward, a=conv(3, 6), b=conv(3, 6), c=nn.Linear(36, 4))


@case((1, 3, 6, 6), free="p t u a b")
def mixer():
    def forward(m, x):
        y = m.p(x).flatten(2)
        y = y + m.u(F.gelu(m.t(y)))
        y = y.transpose(1, 2)
        return m.c((y + m.b(F.gelu(m.a(y)))).mean(1))

    return Net(forward, p=conv(3, 8), t=nn.Linear(36, 10), u=nn.Linear(10, 36), a=nn.Linear(8, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 4))


CASES["mixer"].free = ("p", "t", "a", "b")


@case((1, 3, 4, 4), free="p t a")
def mixer_with_as_many_tokens_as_channels():
    def forward(m, x):
        y = m.p(x).flatten(2)
        y = y + m.u(F.gelu(m.t(y)))
        y = y.transpose(1, 2)
        return m.c((y + m.b(F.gelu(m.a(y)))).mean(1))

    return Net(forward, p=conv(3, 16), t=nn.Linear(16, 16), u=nn.Linear(16, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 4))


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
    return Net(lambda m, x: m.c(m.p(m.b(m.n(m.a(x))))), a=conv(3, 6), n=nn.InstanceNorm2d(6, affine=True, track_running_stats=True), b=conv(6, 8),
               p=nn.InstanceNorm2d(8), c=conv(8, 4))


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


@case(free="a", pinned={"b": "output"})
def weight_norm():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=parametrizations.weight_norm(conv(3, 8)), c=conv(8, 4), b=nn.Identity())


CASES["weight_norm"].pinned = {}


@case((2, 5), pinned={"a": "aten."})
def spectral_norm():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=parametrizations.spectral_norm(nn.Linear(5, 8)), c=nn.Linear(8, 4))


@case(free="a")
def prune_masks():
    return Net(lambda m, x: m.c(F.relu(m.a(x))), a=prune.random_unstructured(conv(3, 8), "weight", 0.5), c=prune.random_unstructured(conv(8, 4), "weight", 0.5))


@case((2, 7), integers=9, pinned={"e": ""})
def tied_embedding_and_head():
    table = nn.Embedding(9, 8)
    head = nn.Linear(8, 9, bias=False)
    head.weight = table.weight
    return Net(lambda m, x: m.head(F.relu(m.a(m.e(x)))), e=table, a=nn.Linear(8, 8), head=head)


CASES["tied_embedding_and_head"].pinned = {}


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


@case((2, 5, 8), pinned={"f": "", "h": ""}, free="f")
def multihead_attention():
    def forward(m, x):
        y = x + m.h(x, x, x, need_weights=False)[0]
        return m.c(F.gelu(m.f(y)))

    return Net(forward, h=nn.MultiheadAttention(8, 2, batch_first=True), f=nn.Linear(8, 12), c=nn.Linear(12, 4))


CASES["multihead_attention"].pinned = {"h": "aten."}


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


@case((2, 7, 5), free="a")
def lstm():
    return Net(lambda m, x: m.c(m.r(F.relu(m.a(x)))[0]), a=nn.Linear(5, 6), r=nn.LSTM(6, 8, batch_first=True), c=nn.Linear(8, 4))


@case((2, 7, 5), free="a")
def gru():
    return Net(lambda m, x: m.c(m.r(F.relu(m.a(x)))[0]), a=nn.Linear(5, 6), r=nn.GRU(6, 8, batch_first=True), c=nn.Linear(8, 4))


@case((2, 5), free="a b")
def linear_view_transposed():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x).view(x.shape[0], -1, 2, 2)))), a=nn.Linear(5, 32), b=nn.ConvTranspose2d(8, 6, 2, 2), c=conv(6, 4))


@case((2, 3, 6, 6), free="a")
def optional_second_argument():
    return Net(lambda m, x, y=None: m.c(m.a(x) if y is None else m.a(x) + y), a=conv(3, 8), c=conv(8, 4))


@case(free="f", pinned={"a": "softmax", "b": "softmax"})
def selective_kernel():
    def forward(m, x):
        stacked = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.e(F.relu(m.f(stacked.sum(1).mean((2, 3)))))
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return m.c((stacked * weights).sum(1))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), f=nn.Linear(8, 6), e=nn.Linear(6, 16), c=conv(8, 4))


CASES["selective_kernel"].pinned, CASES["selective_kernel"].free = {}, ("f", "a", "b")


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
    return Net(lambda m, x: m.c(torch.cdist(m.a(x).flatten(2).mT, m.w).mT.unflatten(2, (6, 6))), a=conv(3, 8), w=nn.Parameter(torch.randn(5, 8)), c=conv(5, 4))


@case(free="a b")
def resized():
    return Net(lambda m, x: m.c(F.interpolate(m.b(F.interpolate(m.a(x), scale_factor=2.0, mode="bilinear")), size=3)), a=conv(3, 8), b=conv(8, 6), c=conv(6, 4))


@case(free="a b")
def reflected_and_pooled():
    return Net(lambda m, x: m.c(F.avg_pool2d(m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect"), 2)), 2)), a=conv(3, 8), b=conv(8, 6), c=conv(6, 4))


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
    return Net(lambda m, x: m.c(m.a(x).repeat(1, 2, 1, 1)) + m.d(m.a(x).repeat_interleave(3, 1)), a=conv(3, 6), c=conv(12, 4), d=conv(18, 4))


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


@case(free="a")
def boolean_selection():
    def forward(m, x):
        y = m.a(x)
        return m.c(y), m.d(x)[m.d(x) > 0].sum()

    return Net(forward, a=conv(3, 8), c=conv(8, 4), d=conv(3, 6))


CASES["boolean_selection"].pinned = {"d": "index"}


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
