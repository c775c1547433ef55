"""Oracle: the blocks' equations written out again, identities of residual networks, and the variances of the initialisations."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build
from models.dpn import DualPathBlock
from models.layers import ChannelScale, PadShortcut


def randomise_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


@pytest.mark.parametrize(("c_in", "c_out"), [(16, 32), (3, 8)])
def test_pad_shortcut_is_slicing_between_zeros(c_in, c_out):
    x = torch.randn(2, c_in, 7, 6)
    front = (c_out - c_in) // 2
    zeros = torch.zeros(2, c_out, 4, 3)
    zeros[:, front : front + c_in] = x[:, :, ::2, ::2]
    assert torch.equal(PadShortcut(c_in, c_out, 2)(x), zeros)


def test_pad_shortcut_reads_its_attributes():
    module = PadShortcut(4, 8, 2)
    module.front, module.back, module.stride = 1, 0, 1
    x = torch.randn(2, 3, 5, 5)
    y = module(x)
    assert y.shape == (2, 4, 5, 5)
    assert torch.equal(y[:, 1:], x) and not y[:, 0].any()


def test_avgpool_shortcut_appends_zeros():
    block = build("resnet20", 10, shortcut="avgpool").layer2[0]
    x = torch.randn(2, 16, 8, 8)
    y = block.shortcut(x)
    assert torch.equal(y[:, :16], F.avg_pool2d(x, 2)) and not y[:, 16:].any()


def test_resnet20_is_the_published_equation():
    model = randomise_batchnorm(build("resnet20", 10))
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    y = F.relu(model.bn1(F.conv2d(x, model.conv1.weight, padding=1)))
    for stage, (layer, c) in enumerate(((model.layer1, 16), (model.layer2, 32), (model.layer3, 64))):
        for index, block in enumerate(layer):
            stride = 2 if stage > 0 and index == 0 else 1
            out = F.relu(block.bn1(F.conv2d(y, block.conv1.weight, stride=stride, padding=1)))
            out = block.bn2(F.conv2d(out, block.conv2.weight, padding=1))
            if stride == 2:
                quarter = y.new_zeros(3, c // 4, *out.shape[2:])
                y = torch.cat([quarter, y[:, :, ::2, ::2], quarter], dim=1)
            y = F.relu(out + y)
    expected = F.linear(F.avg_pool2d(y, 4).flatten(1), model.linear.weight, model.linear.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_dual_path_block_adds_the_first_and_appends_the_other_channels():
    block = randomise_batchnorm(DualPathBlock(20, 32, 12, 4, stride=2, first=True))
    x = torch.randn(2, 20, 6, 6, dtype=torch.float64)
    out = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))))
    skip = block.shortcut(x)
    y = block(x)
    assert y.shape == (2, 12 + 2 * 4, 3, 3)
    torch.testing.assert_close(y[:, :12], F.relu(out[:, :12] + skip[:, :12]))
    torch.testing.assert_close(y[:, 12:], F.relu(torch.cat([skip[:, 12:], out[:, 12:]], 1)))


@pytest.mark.parametrize("name", ["preresnet110", "preresnet110_bottleneck", "wrn_16_8"])
def test_pre_activation_block_without_branch_is_the_identity(name):
    """Nothing follows the sum (He et al. 2016b, eq. 5), so a block whose last convolution is zero returns its input, unrectified."""
    model = build(name, 10)
    block = model.layer1[1]
    last = block.conv3 if name.endswith("bottleneck") else block.conv2
    nn.init.zeros_(last.weight)
    x = torch.randn(2, block.bn1.num_features, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("name", "activated"), [("preresnet110", False), ("wrn_16_8", True)])
def test_what_the_pre_activation_shortcut_reads(name, activated):
    block = randomise_batchnorm(build(name, 10)).layer2[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, block.bn1.num_features, 4, 4, dtype=torch.float64)
    source = F.relu(block.bn1(x)) if activated else x
    torch.testing.assert_close(block(x), block.shortcut(source))


def test_bottleneck_stride_is_on_the_3x3_convolution():
    strides = {(m.kernel_size[0], m.stride[0]) for m in build("resnet50", 10).layer2[0].children() if isinstance(m, nn.Conv2d)}
    assert strides == {(1, 1), (3, 2)}


def test_vgg_variants_differ_only_in_the_last_pooling():
    largest = randomise_batchnorm(build("vgg11", 10, width=0.25))
    average = randomise_batchnorm(build("vgg11", 10, width=0.25, variant="average"))
    average.load_state_dict(largest.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = average.features(x)
    assert features.shape[2:] == (2, 2)
    torch.testing.assert_close(largest(x), largest.classifier(F.max_pool2d(features, 2).flatten(1)))
    torch.testing.assert_close(average(x), average.classifier(F.avg_pool2d(features, 2).flatten(1)))


def std_over_law(weight, fan):
    return float(weight.detach().std()) / math.sqrt(2 / fan)


@pytest.mark.parametrize(
    ("name", "layer", "fan"),
    [
        ("resnet20", "layer3.2.conv2", 9 * 64),
        ("vgg11_plain", "features.3", 9 * 64),
        ("preresnet110_bottleneck", "layer3.1.conv3", 256),
        ("wrn_16_8", "layer2.0.conv1", 9 * 256),
        ("vgg16_weight_level", "features.7", 9 * 128),
    ],
)
def test_initial_standard_deviation(name, layer, fan):
    """Fan-in (channels that are read) for the first two, fan-out (channels that are written) for the others; standard error below 1 %."""
    weight = build(name, 10).get_submodule(layer).weight
    assert std_over_law(weight, fan) == pytest.approx(1, abs=0.03)


def test_initial_values_of_vgg16_weight_level():
    model = build("vgg16_weight_level", 10)
    assert all((m.weight == 0.5).all() for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert float(model.classifier[0].weight.detach().std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "size"), [("resnet20", {}, 8), ("dpn26", {}, 8), ("vgg11", {"width": 0.25}, 32), ("wrn_16_8", {"width": 1}, 8)]
)
def test_exported_program_computes_the_same_for_another_batch_size(name, options, size):
    model = build(name, 10, 1, **options).eval()
    program = torch.export.export(model, (torch.randn(2, 1, size, size),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.randn(3, 1, size, size)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(("name", "count"), [("resnet20", 7), ("resnet18", 5), ("resnet50", 12)])
def test_skip_scales_start_as_the_identity_and_scale_the_skip_path(name, count):
    torch.manual_seed(0)
    plain = build(name, 10, width=0.25).eval()
    scaled = build(name, 10, width=0.25, skip_scale=True).eval()
    left = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    scales = [module for module in scaled.modules() if isinstance(module, ChannelScale)]
    assert len(scales) == len(left) == count and all(name.endswith("shortcut.weight") for name in left)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), scaled(x))
    y = torch.randn(2, 3, 4, 5)
    scale = ChannelScale(3)
    nn.init.normal_(scale.weight)
    torch.testing.assert_close(scale(y), torch.einsum("nchw,c->nchw", y, scale.weight))
