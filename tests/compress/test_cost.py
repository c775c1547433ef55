"""Oracle: closed formulas for MACs, parameters and output sizes, evaluated from the shapes alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.cost import batch_size, count, layer_costs
from compress.errors import UserError


def conv_side(side, conv, axis):
    return (side + 2 * conv.padding[axis] - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1) // conv.stride[axis] + 1


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 5, "padding": 2, "dilation": 2},
    {"kernel_size": 1, "bias": False}, {"kernel_size": 3, "groups": 4}, {"kernel_size": (1, 3), "padding": (0, 1), "stride": (1, 1)},
    {"kernel_size": 3, "groups": 8, "padding": 1, "stride": 3}])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution(options, batch):
    conv = nn.Conv2d(8, 16, **options)
    positions = conv_side(19, conv, 0) * conv_side(17, conv, 1)
    macs = positions * 16 * (8 // conv.groups) * conv.kernel_size[0] * conv.kernel_size[1]
    cost = count(conv, torch.zeros(batch, 8, 19, 17))
    assert (cost.params, cost.macs, cost.activation_bytes) == (sum(p.numel() for p in conv.parameters()), macs, 4 * 16 * positions)
    assert cost.flops == 2 * macs


def test_linear_counts_positions_and_no_bias():
    cost = count(nn.Linear(20, 30), torch.zeros(4, 7, 20))
    assert (cost.params, cost.macs, cost.activation_bytes) == (20 * 30 + 30, 7 * 20 * 30, 4 * 7 * 30)


class Attention(nn.Module):
    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["functional", "multihead", "encoder_layer"])
def test_attention(kind, frozen):
    dim, tokens, heads, hidden = 32, 10, 4, 48
    projections, products = 4 * tokens * dim**2, 2 * tokens**2 * dim
    macs = projections + products
    if kind == "functional":
        model, inputs = Attention(dim, heads), torch.randn(2, tokens, dim)
    elif kind == "multihead":
        model, x = nn.MultiheadAttention(dim, heads, batch_first=True), torch.randn(2, tokens, dim)
        inputs = (x, x, x)
    else:
        model, inputs = nn.TransformerEncoderLayer(dim, heads, hidden, batch_first=True), torch.randn(2, tokens, dim)
        macs += 2 * tokens * dim * hidden
    model.requires_grad_(not frozen)
    with torch.no_grad():
        assert count(model, inputs).macs == macs


class Shortcut(nn.Module):
    """Stands for modules that take a fused path, which no counter sees, wherever gradients are off or the backend has one."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), None

    def forward(self, x):
        self.seen = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.cuda.flash_sdp_enabled(), self.training
        return self.linear(x)


def test_no_fused_path_is_open_while_counting():
    model = Shortcut()
    with torch.inference_mode():
        count(model, torch.zeros(1, 4))
    assert model.seen == (True, False, False, False)
    assert torch.backends.cuda.flash_sdp_enabled()


def resnet_formula(layers, bottleneck):
    """MACs and parameters of an ImageNet ResNet at 224 pixels from its definition (stride in the 3x3 convolution)."""
    side, channels = 112, 64
    macs, params = side**2 * 64 * 3 * 49, 64 * 3 * 49 + 2 * 64
    side = 56
    for stage, blocks in enumerate(layers):
        width = 64 * 2**stage
        out = width * 4 if bottleneck else width
        for block in range(blocks):
            after = side // 2 if stage and not block else side
            convs = ([(side, channels, width, 1), (after, width, width, 9), (after, width, out, 1)] if bottleneck
                     else [(after, channels, width, 9), (after, width, width, 9)])
            if not block and (after != side or channels != out):
                convs.append((after, channels, out, 1))
            macs += sum(s**2 * i * o * k for s, i, o, k in convs)
            params += sum(i * o * k + 2 * o for _, i, o, k in convs)
            side, channels = after, out
    return macs + channels * 1000, params + channels * 1000 + 1000


@pytest.mark.parametrize("name, layers, bottleneck, published", [
    ("resnet18", [2, 2, 2, 2], False, 1.814), ("resnet50", [3, 4, 6, 3], True, 4.089)])
def test_torchvision_resnet(name, layers, bottleneck, published):
    import torchvision

    cost = count(torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, 224, 224))
    assert (cost.macs, cost.params) == resnet_formula(layers, bottleneck)
    assert cost.macs / 1e9 == pytest.approx(published, abs=5e-4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.relu = nn.ReLU(inplace=True)
        self.alias = self.twice

    def forward(self, x):
        return self.alias(self.relu(self.twice(self.b(self.a(x))))) @ self.a.weight


def test_tied_parameters_repeated_calls_and_functional_products():
    model = Tied()
    rows = {row.name: row for row in layer_costs(model, torch.zeros(2, 6))}
    assert {name: row.macs for name, row in rows.items()} == {"": 36, "a": 36, "b": 36, "twice": 72}
    assert {name: row.params for name, row in rows.items()} == {"": 0, "a": 42, "b": 6, "twice": 42}
    # The ReLU works in place and adds nothing; the layer that runs twice has two outputs.
    assert {name: row.activation_bytes for name, row in rows.items()} == {"": 0, "a": 24, "b": 24, "twice": 48}
    cost = count(model, torch.zeros(2, 6))
    assert (cost.params, cost.macs, cost.activation_bytes) == (90, 180, 96)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            count(model, torch.zeros(1, 3, 9, 9))
    else:
        count(model, torch.zeros(1, 3, 4, 4))
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_half_precision_halves_the_activation_bytes_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 8, 3, bias=False))
    x = torch.zeros(1, 3, 8, 8)
    single, half = count(model, x), count(model.bfloat16(), x.bfloat16())
    assert (half.params, half.macs, 2 * half.activation_bytes) == (single.params, single.macs, single.activation_bytes)


def test_inputs_without_a_batch_are_refused():
    with pytest.raises(UserError, match="batch dimension"):
        count(nn.Identity(), (3,))
    assert batch_size((torch.zeros(5, 2), torch.zeros(3))) == 5
