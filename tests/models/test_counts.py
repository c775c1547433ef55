"""Oracle: published parameter and MAC counts (tables of the papers and their code), and closed formulas evaluated layer by layer."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build, names

# depth, parameters and MACs with BatchNorm and one linear layer (5,130 parameters); the head of three on 512 features has 199,690.
VGGS = [(11, 9_231_114, 152_769_536), (13, 9_416_010, 228_267_008), (16, 14_728_266, 313_201_664), (19, 20_040_522, 398_136_320)]
# name, options, parameters for 10 classes, MACs for 10 classes at 3x32x32
TABLE = [
    ("vgg11", {}, 9_231_114, 152_769_536),
    ("vgg11_plain", {}, 9_225_610, 152_769_536),
    ("vgg13", {}, 9_416_010, 228_267_008),
    ("vgg13_plain", {}, 9_410_122, 228_267_008),
    ("vgg16", {}, 14_728_266, 313_201_664),
    ("vgg16", {"variant": "average"}, 14_728_266, 313_201_664),
    ("vgg16_plain", {}, 14_719_818, 313_201_664),
    ("vgg16_weight_level", {}, 14_987_722, 313_463_808),
    ("vgg19", {}, 20_040_522, 398_136_320),
    ("vgg19_plain", {}, 20_029_514, 398_136_320),
    ("resnet20", {}, 269_722, 40_551_040),
    ("resnet20", {"shortcut": "conv"}, 272_474, 40_813_184),
    ("resnet32", {}, 464_154, 68_862_592),
    ("resnet32", {"shortcut": "conv"}, 466_906, 69_124_736),
    ("resnet32", {"shortcut": "conv", "width": 2}, 1_860_522, 275_612_928),
    ("resnet32x2", {}, 1_860_522, 275_612_928),
    ("resnet32x4", {}, 7_427_914, 1_100_679_680),
    ("resnet44", {}, 658_586, 97_174_144),
    ("resnet56", {}, 853_018, 125_485_696),
    ("resnet56", {"shortcut": "conv"}, 855_770, 125_747_840),
    ("resnet56", {"shortcut": "avgpool"}, 853_018, 125_485_696),
    ("resnet110", {}, 1_727_962, 252_887_680),
    ("resnet110", {"shortcut": "conv"}, 1_730_714, 253_149_824),
    ("resnet1202", {}, 19_421_274, 2_829_238_912),
    ("resnet1202", {"shortcut": "conv"}, 19_424_026, 2_829_501_056),
    ("resnet20", {"shortcut": "conv", "skip_scale": True}, 272_714, 40_813_184),
    ("resnet32", {"shortcut": "conv", "skip_scale": True}, 467_370, 69_124_736),
    ("resnet56", {"shortcut": "conv", "skip_scale": True}, 856_682, 125_747_840),
    ("resnet110", {"shortcut": "conv", "skip_scale": True}, 1_732_634, 253_149_824),
    ("resnet18", {"skip_scale": True}, 11_174_986, 555_422_720),
    ("resnet50", {"skip_scale": True}, 23_532_106, 1_297_829_888),
    ("preresnet110", {}, 1_730_522, 253_149_824),
    ("preresnet110_bottleneck", {}, 1_146_842, 167_430_656),
    ("preresnet164", {}, 1_703_258, 247_646_720),
    ("wrn_16_8", {}, 10_961_370, 1_548_145_664),
    ("wrn_28_10", {}, 36_479_194, 5_243_328_768),
    ("resnet18", {}, 11_173_962, 555_422_720),
    ("resnet34", {}, 21_282_122, 1_159_402_496),
    ("resnet50", {}, 23_520_842, 1_297_829_888),
    ("resnet101", {}, 42_512_970, 2_509_983_744),
    ("resnet152", {}, 58_156_618, 3_722_137_600),
    ("dpn26", {}, 11_574_842, 665_050_880),
    ("dpn92", {}, 34_236_634, 2_042_422_272),
    *((f"vgg{depth}_fc3", {"image_size": 32}, params - 5_130 + 199_690, macs - 5_120 + 199_168) for depth, params, macs in VGGS),
    *(
        (f"vgg{depth}_fc3_plain", {"image_size": 32}, params - norms - 5_130 + 199_690, macs - 5_120 + 199_168)
        for (depth, params, macs), norms in zip(VGGS, (5_504, 5_888, 8_448, 11_008), strict=True)
    ),
    ("fc", {}, 348_710, 348_200),
    ("conv", {}, 337_834, 10_649_600),
]
# name, parameters for 100 classes
HUNDRED = {
    "vgg16": 14_774_436,
    "vgg16_weight_level": 15_033_892,
    "resnet32x4": 7_451_044,
    "resnet50": 23_705_252,
    "dpn92": 34_467_124,
}
# name, convolution weights, BatchNorm scales
SPLIT = {
    "vgg16": (14_710_464, 4_224),
    "vgg16_plain": (14_710_464, 0),
    "vgg16_weight_level": (14_710_464, 4_736),
    "vgg19": (20_018_880, 5_504),
    "vgg11": (9_217_728, 2_752),
    "resnet20": (267_696, 688),
    "resnet32": (461_232, 1_136),
    "resnet44": (654_768, 1_584),
    "resnet56": (848_304, 2_032),
    "resnet110": (1_719_216, 4_048),
    "preresnet110": (1_721_776, 4_048),
    "preresnet110_bottleneck": (1_128_112, 8_080),
    "preresnet164": (1_676_464, 12_112),
    "wrn_16_8": (10_949_040, 3_600),
    "resnet18": (11_159_232, 4_800),
    "resnet50": (23_447_232, 26_560),
    "dpn92": (34_097_696, 56_664),
    "dpn26": (11_514_624, 17_944),
    "resnet32x4": (7_415_488, 4_928),
    "resnet32x2": (1_854_304, 2_464),
}


def on_meta(name, num_classes=10, in_channels=3, **options):
    with torch.device("meta"):
        return build(name, num_classes, in_channels, **options).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs_two_ways(model, shape):
    """PyTorch's count, and the closed form: output values of a layer times the weights that each of them reads."""
    total = 0

    def add(module, _, output):
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *shape, device="meta"))
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() // 2, total


@pytest.mark.parametrize(("name", "options", "params", "macs"), TABLE, ids=lambda value: str(value).replace(" ", ""))
def test_parameters_and_macs(name, options, params, macs):
    model = on_meta(name, **options)
    assert parameters(model) == params
    assert macs_two_ways(model, (3, 32, 32)) == (macs, macs)


def test_the_table_covers_every_network():
    assert {row[0] for row in TABLE} == set(names())


@pytest.mark.parametrize("name", HUNDRED)
def test_parameters_for_100_classes(name):
    assert parameters(on_meta(name, 100)) == HUNDRED[name]


def test_resnet32x4_macs_for_100_classes():
    assert macs_two_ways(on_meta("resnet32x4", 100), (3, 32, 32)) == (1_100_702_720, 1_100_702_720)


@pytest.mark.parametrize("name", SPLIT)
def test_convolution_weights_and_batchnorm_scales(name):
    modules = list(on_meta(name).modules())
    convolutions = sum(m.weight.numel() for m in modules if isinstance(m, nn.Conv2d))
    scales = sum(m.weight.numel() for m in modules if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert (convolutions, scales) == SPLIT[name]


@pytest.mark.parametrize(("name", "params", "macs"), [("fc", 119_910, 119_400), ("conv", 260_458, 7_702_016)])
def test_small_networks_on_28x28(name, params, macs):
    model = on_meta(name, 10, 1, image_size=28)
    assert parameters(model) == params
    assert macs_two_ways(model, (1, 28, 28)) == (macs, macs)


def test_tiny_imagenet_vgg16():
    """Its head reads 2,048 features and has 1,024 hidden units; the convolutions work on four times as many pixels as at 32x32."""
    model = on_meta("vgg16_fc3", 200)
    head = 2048 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 200 + 200
    assert parameters(model) == 14_728_266 - 5_130 + head == 18_075_912
    macs = 4 * (313_201_664 - 5_120) + 2048 * 1024 + 1024 * 1024 + 1024 * 200
    assert macs_two_ways(model, (3, 64, 64)) == (macs, macs)


def test_wide_resnet50_is_torchvisions_but_for_stem_and_classes():
    """68,883,240 parameters with a 7x7 stem (9,408) and 1,000 classes."""
    expected = 68_883_240 - 2_049_000 + 20_490 - 9_408 + 1_728
    assert parameters(on_meta("resnet50", inner_width=2)) == expected


def test_vgg16_macs_per_layer():
    macs = []
    model = on_meta("vgg16")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: macs.append(out.numel() * m.weight[0].numel()))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    big, half, small = 37_748_736, 18_874_368, 9_437_184
    assert macs == [1_769_472, big, half, big, half, big, big, half, big, big, small, small, small, 5_120]


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "preresnet110", "dpn26", "resnet50", "wrn_16_8"])
def test_one_input_channel_saves_two_thirds_of_the_first_convolution(name):
    three, one = on_meta(name), on_meta(name, in_channels=1)
    stem = next(m for m in three.modules() if isinstance(m, nn.Conv2d))
    assert parameters(three) - parameters(one) == stem.weight.numel() // 3 * 2


def test_torchvision_parameters():
    """Published counts for 1,000 classes."""
    published = {
        "resnet18": 11_689_512,
        "resnet50": 25_557_032,
        "vgg16_bn": 138_365_992,
        "mobilenet_v2": 3_504_872,
        "efficientnet_b0": 5_288_548,
    }
    assert {name: parameters(on_meta(f"torchvision/{name}", 1000)) for name in published} == published
