"""Oracle: the dense Hessian by torch.autograd.functional, whose diagonal Hutchinson's estimate averages to; sums over members by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.criteria import CRITERIA
from compress.graph import trace
from tests.compress.curvature.nets import randn


class Attention(nn.Module):
    """A convolution before and two linear layers behind multi-head attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, 4, 2, 2), nn.Linear(4, 3)
        self.block = nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True)
        self.double().eval()

    def forward(self, x):
        return self.head(self.block(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


X, Y = randn(6, 1, 4, 4), torch.arange(6) % 3


def hessian(net, name, loss_fn=functional.cross_entropy):
    weight = net.get_parameter(name).detach()

    def loss(value):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss_fn(torch.func.functional_call(net, {name: value}, (X,)), Y)

    return torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel())


def test_networks_with_attention_are_scored():
    net = Attention()
    name = "block.linear1.weight"
    ours = CRITERIA["hessian_trace"].score(trace(net, X[:1]), net, [(X, Y)], functional.cross_entropy, torch.Generator().manual_seed(0),
                                           probes=3000)[name]
    weight = net.get_parameter(name).detach()
    exact = hessian(net, name).diagonal().reshape(weight.shape).mean(1) * weight.square().sum(1)
    torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


class Stream(nn.Module):
    """A residual stream that two convolutions make and two layers read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
        self.double().eval()

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.head((x + torch.tanh(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("side", ["producer", "consumer"])
def test_a_linear_loss_of_the_last_layer_has_no_curvature(side):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    weight = {"producer": "0.weight", "consumer": "2.weight"}[side]
    scores = CRITERIA["hessian_trace"].score(trace(net, X[:1]), net, [(X, Y)], lambda out, y: out.mean(), torch.Generator().manual_seed(0),
                                             side=side)
    assert not hessian(net, weight, lambda out, y: out.mean()).any() and not scores["0.weight"].any()


@pytest.mark.parametrize("side, names", [("producer", ["stem.weight", "a.weight"]), ("consumer", ["a.weight", "head.weight"])])
def test_a_residual_stream_adds_the_traces_of_its_layers(side, names):
    net = Stream()
    graph = trace(net, X[:1])
    group, = (group for group in graph.groups if group.prunable)
    members = [m for m in group.members if m.role == {"producer": "out", "consumer": "in"}[side] and m.parameter.endswith("weight")]
    assert [m.parameter for m in members] == names
    weights = {name: net.get_parameter(name).detach() for name in names}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = {name: part.reshape(weights[name].shape) for name, part in zip(names, flat.split(sizes), strict=True)}
        return functional.cross_entropy(torch.func.functional_call(net, parts, (X,)), Y)

    dense = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten() for weight in weights.values()]))
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([(torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).flatten() for weight in weights.values()]).double()
    expected = 0
    for member, diagonal in zip(members, (signs * (dense @ signs)).split(sizes), strict=True):
        weight = weights[member.parameter]
        rows, squares = (t.reshape(weight.shape).movedim(member.dim, 0).flatten(1) for t in (diagonal, weight.square()))
        expected = expected + rows.mean(1) * squares.sum(1)
    ours = CRITERIA["hessian_trace"].score(
        graph, net, [(X, Y)], functional.cross_entropy, torch.Generator().manual_seed(0), probes=1, side=side)
    torch.testing.assert_close(ours[group.name], expected)
