"""Oracle: the dense layer itself, borders included, and MACs counted by torch.utils.flop_counter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.decompose import factorize, recompose
from compress.decompose.factors import Factors
from compress.decompose.modules import dense_weight, describe, factors_cost, layer_cost, rebuild, replace_module
from compress.errors import UserError
from compress.export import to_onnx

CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "rows and columns differ": dict(kernel_size=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "dilation": dict(kernel_size=3, padding=2, dilation=2, bias=False),
    "even, same": dict(kernel_size=4, padding="same"),
    "even, same, reflect": dict(kernel_size=2, padding="same", padding_mode="reflect"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=(1, 2), padding_mode="reflect"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "replicate": dict(kernel_size=(1, 3), padding=(0, 1), padding_mode="replicate"),
    "1x1": dict(kernel_size=1),
    "1x1 stride and padding": dict(kernel_size=1, stride=2, padding=1),
    "kx1": dict(kernel_size=(3, 1), stride=(2, 3), padding=(1, 1)),
    "groups": dict(kernel_size=3, padding=1, groups=2),
}
FULL = {"svd": 8, "tucker2": (8, 6), "svd input": 6, "svd spatial": None, "eigendamage": (8, 6), "kfac_svd": 8, "kfac_tucker2": (8, 6)}


def moment(size, seed):
    x = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / x.shape[1]


def full_rank(conv, method):
    """Arguments of `factorize` at full rank for one group of the layer."""
    o, c = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    kh, kw = conv.kernel_size
    name, _, mode = method.partition(" ")
    options = {"mode": mode} if mode else {}
    rank = {
        "svd": min(o, c * kh * kw),
        "svd input": min(o * kh * kw, c),
        "svd spatial": min(o * kw, c * kh),
        "kfac_svd": min(o, c * kh * kw),
    }.get(method, (o, c))
    if name.startswith("kfac") or name == "eigendamage":
        options |= {
            "A": torch.stack([moment(c * kh * kw + 1, g) for g in range(conv.groups)]),
            "G": torch.stack([moment(o, g + 9) for g in range(conv.groups)]),
        }
    return name, rank, options


@pytest.mark.parametrize("method", list(FULL))
@pytest.mark.parametrize("case", list(CONVS))
def test_full_rank_blocks_reproduce_the_convolution_at_its_borders(case, method):
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 8, **CONVS[case]).double()
    name, rank, options = full_rank(conv, method)
    block = factorize(conv, name, rank, only_if_smaller=False, **options)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), conv(x), rtol=0, atol=2e-12)
    torch.testing.assert_close(dense_weight(block), conv.weight.detach(), rtol=0, atol=2e-12)


@pytest.mark.parametrize("method", ["svd", "tucker2", "eigendamage", "kfac_svd", "kfac_tucker2"])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_blocks_reproduce_a_linear_layer(method, bias):
    linear = nn.Linear(5, 7, bias=bias)
    options = {} if method in ("svd", "tucker2") else {"A": moment(5 + bias, 0), "G": moment(7, 1)}
    block = factorize(
        linear, method, (7, 5) if method in ("tucker2", "eigendamage", "kfac_tucker2") else 5, only_if_smaller=False, **options
    )
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(block(x), linear(x), rtol=1e-5, atol=1e-5)
    assert (block[-1].bias is not None) == bias


@pytest.mark.parametrize(
    "factors",
    [
        Factors(torch.randn(3, 6), torch.randn(4, 3, 3, 3), torch.randn(8, 4)),
        Factors(None, torch.randn(4, 6, 3, 3), torch.randn(8, 4)),
        Factors(torch.randn(3, 6), torch.randn(8, 3, 3, 3), None),
        Factors(torch.randn(3, 6), torch.randn(3, 1, 3, 3), torch.randn(8, 3), depthwise=True),
        Factors(None, torch.randn(3, 6, 3, 1), torch.randn(8, 3, 1, 3)),
    ],
)
@pytest.mark.parametrize(
    "geometry", [dict(stride=2, padding=1), dict(padding="same", dilation=2), dict(padding=(2, 1), padding_mode="reflect")]
)
def test_every_form_computes_its_product_and_costs_what_is_counted(factors, geometry):
    conv = nn.Conv2d(6, 8, 3, **geometry)
    block = factorize(conv, factors, only_if_smaller=False)
    composed = nn.Conv2d(6, 8, 3, **geometry)
    composed.weight.data, composed.bias.data = recompose(factors), conv.bias.data
    x = torch.randn(1, 6, 9, 10)
    with FlopCounterMode(display=False) as counter:
        out = block(x)
    torch.testing.assert_close(out, composed(x), rtol=1e-4, atol=1e-3)
    expected = (sum(p.numel() for p in block.parameters()), counter.get_total_flops() // 2)
    assert layer_cost(block, (6, 9, 10)) == factors_cost(conv, factors, (6, 9, 10)) == expected


def test_a_strided_1x1_strides_in_its_first_factor():
    block = factorize(nn.Conv2d(6, 8, 1, stride=2), "tucker2", (2, 2))
    assert block.input.stride == (2, 2) and block.core.stride == block.output.stride == (1, 1)


def test_nothing_gained_returns_the_very_same_module():
    conv, linear = nn.Conv2d(6, 8, 3), nn.Linear(5, 7)
    assert factorize(conv, "tucker2", (8, 6)) is conv
    assert factorize(linear, "svd", 5) is linear
    assert factorize(linear, "svd", 1) is not linear


def test_fewer_parameters_but_more_macs_is_refused():
    # the first 1x1 of a strided block runs at the full input resolution
    conv = nn.Conv2d(16, 16, 3, stride=3)
    assert factorize(conv, "tucker2", (8, 15)) is not conv
    assert factorize(conv, "tucker2", (8, 15), input_shape=(16, 30, 30)) is conv


def test_type_flags_and_random_state_are_kept():
    conv = nn.Conv2d(6, 8, 3).to(torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    block = factorize(conv, "tucker2", (2, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not block.training and block.core.weight.dtype == torch.bfloat16 and not block.core.weight.requires_grad
    assert block.output.bias.requires_grad and block.output.bias is not conv.bias
    assert (block.in_channels, block.out_channels, block.kernel_size) == (6, 8, (3, 3))


def test_second_round_decomposes_the_product():
    conv = nn.Conv2d(6, 8, 3, padding=1).double()
    once = factorize(conv, "tucker2", (4, 3))
    assert factorize(once, "tucker2", (4, 3)) is once
    twice = factorize(once, "tucker2", (3, 2))
    direct = factorize(once, "svd", 3, only_if_smaller=False)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    assert layer_cost(twice, (6, 5, 5)) < layer_cost(once, (6, 5, 5))
    assert direct(x).shape == twice(x).shape == once(x).shape


@pytest.mark.parametrize("case", list(CONVS))
def test_a_block_multiplied_out_is_the_block(case):
    conv = nn.Conv2d(6, 8, **CONVS[case]).double()
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    for method, rank in (("tucker2", (2, 2)), ("svd", 2), ("cp", 2)):
        block = factorize(conv, method, rank, only_if_smaller=False)
        expected = block(x)
        with torch.no_grad():
            conv.weight.copy_(dense_weight(block))
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["tucker2", "svd", "eigendamage", "kfac_svd", "kfac_tucker2"])
def test_full_rank_in_single_precision(method):
    conv, x = nn.Conv2d(6, 8, 3, padding=1), torch.randn(2, 6, 9, 10)
    name, rank, options = full_rank(conv, method)
    torch.testing.assert_close(factorize(conv, name, rank, only_if_smaller=False, **options)(x), conv(x), rtol=1e-5, atol=1e-5)


def test_a_network_of_blocks_is_written_as_onnx_and_read_back(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    for name, method, rank in (("0", "tucker2", (3, 3)), ("3", "svd", 2)):
        replace_module(net, name, factorize(net.get_submodule(name), method, rank))
    x = torch.randn(2, 6, 4, 4)
    to_onnx(net, x, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


def test_state_dict_safetensors_rebuild_and_export(tmp_path):
    net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    fresh = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    for name, method, rank in (("0", "cp", 3), ("3", "svd", 2)):
        replace_module(net, name, factorize(net.get_submodule(name), method, rank))
        description = json.loads(json.dumps(describe(net.get_submodule(name))))
        replace_module(fresh, name, rebuild(fresh.get_submodule(name), description))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(fresh(x), net(x))
    assert set(net.state_dict()) == {
        "0.input.weight",
        "0.core.weight",
        "0.output.weight",
        "0.output.bias",
        "3.input.weight",
        "3.output.weight",
        "3.output.bias",
    }
    exported = torch.export.export(net.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    replace_module(net, "2", factorize(layer, "svd", 1))
    assert net[0] is net[2] is not layer


@pytest.mark.parametrize("call, words", [
    (lambda: factorize(nn.ConvTranspose2d(3, 3, 1), "svd", 1), "ConvTranspose2d"),
    (lambda: factorize(nn.Linear(3, 4), "sdv", 1), "did you mean 'svd'"),
    (lambda: factorize(nn.Linear(3, 4), "svd"), "needs a rank"),
    (lambda: factorize(nn.Linear(3, 4), "kfac_svd", 1), "A and G"),
    (lambda: factorize(nn.Linear(3, 4), "kfac_svd", 1, A=moment(6, 0), G=moment(4, 1)), "(6, 6)"),
    (lambda: factorize(nn.Linear(3, 4), Factors(torch.ones(1, 3), None, torch.ones(5, 1))), "(5, 3)"),
    (lambda: factorize(nn.Conv2d(4, 4, 3, groups=2), Factors(None, torch.ones(2, 4, 3, 3), torch.ones(4, 2))), "(4, 4, 3, 3)"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
