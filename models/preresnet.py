"""Pre-activation ResNets for 32x32 images: preresnet110 (basic blocks), preresnet110_bottleneck, preresnet164, wrn_16_8, wrn_28_10.

He et al. 2016 (arXiv:1603.05027): BatchNorm and ReLU precede each convolution and follow the last stage once more; the sum of branch and
shortcut is left as it is. Three stages of 16, 32 and 64 channels (times 4 behind bottleneck blocks, times `width`). Where channels or image
size change, the shortcut is a 1x1 convolution without BatchNorm; it reads the block's input in PreResNets, and the input after
BatchNorm and ReLU in wide ResNets (Zagoruyko & Komodakis 2016, arXiv:1605.07146), whose stem keeps 16 channels.

Initialisation: convolutions normal of variance 2 / (k k c_out); BatchNorm (1, 0); linear layer PyTorch's default, with zero
bias in wide ResNets.

Counts at 32x32 and 3 input channels, 10 classes:

| name | blocks per stage | parameters | MACs |
|---|---|---|---|
| preresnet110 | 18 basic | 1,730,522 | 253,149,824 |
| preresnet110_bottleneck | 12 bottleneck | 1,146,842 | 167,430,656 |
| preresnet164 | 18 bottleneck | 1,703,258 | 247,646,720 |
| wrn_16_8 | 2 basic | 10,961,370 | 1,548,145,664 |
| wrn_28_10 | 4 basic | 36,479,194 | 5,243,328,768 |
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_kaiming_fan_out
from .options import scaled
from .registry import register


class PreActivationBlock(nn.Module):
    """`branch(x) + shortcut(x)`, `[n, c_in, h, w] -> [n, c_out, ceil(h / stride), ceil(w / stride)]`.

    Parameters
    ----------
    widths:
        Channels from the input to the output, one convolution between each two; 3x3 convolutions for one inner width (basic),
        1x1 - 3x3 - 1x1 for two (bottleneck).
    stride:
        Of the first 3x3 convolution.
    activated:
        Whether the shortcut convolution reads the input after BatchNorm and ReLU.
    """

    def __init__(self, widths: tuple[int, ...], stride: int, activated: bool) -> None:
        super().__init__()
        bottleneck = len(widths) == 4
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            kernel = 1 if bottleneck and index != 2 else 3
            step = stride if index == (2 if bottleneck else 1) else 1
            self.add_module(f"bn{index}", nn.BatchNorm2d(before))
            self.add_module(f"conv{index}", nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False))
        self.bottleneck = bottleneck
        self.activated = activated
        changes = stride != 1 or widths[0] != widths[-1]
        self.shortcut = nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(x))
        if self.shortcut is None:
            skip = x
        else:
            skip = self.shortcut(first if self.activated else x)
        out = self.conv2(F.relu(self.bn2(self.conv1(first))))
        if self.bottleneck:
            out = self.conv3(F.relu(self.bn3(out)))
        return out + skip


class PreResNet(nn.Module):
    """The network; `[n, in_channels, h, w] -> [n, num_classes]`. `stem`, `channels`: channels of the stem and inside the three stages."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        blocks: int,
        stem: int,
        channels: tuple[int, int, int],
        *,
        bottleneck: bool,
        activated_shortcut: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        before = stem
        stages = []
        for index, inner in enumerate(channels):
            stage = []
            for block in range(blocks):
                widths = (before, inner, inner, 4 * inner) if bottleneck else (before, inner, inner)
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(PreActivationBlock(widths, stride, activated_shortcut))
                before = widths[-1]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, num_classes)
        init_kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


def preresnet(num_classes: int, in_channels: int, blocks: int, bottleneck: bool, width: float = 1) -> PreResNet:
    """A pre-activation ResNet of `blocks` blocks per stage; `width` multiplies the channels 16, 32 and 64."""
    channels = (scaled(16, width), scaled(32, width), scaled(64, width))
    return PreResNet(num_classes, in_channels, blocks, channels[0], channels, bottleneck=bottleneck, activated_shortcut=False)


def wide_resnet(num_classes: int, in_channels: int, blocks: int, width: float) -> PreResNet:
    """A wide ResNet of `blocks` blocks per stage with 16, 32 and 64 channels times `width`, behind a stem of 16."""
    channels = (scaled(16, width), scaled(32, width), scaled(64, width))
    model = PreResNet(num_classes, in_channels, blocks, 16, channels, bottleneck=False, activated_shortcut=True)
    nn.init.zeros_(model.linear.bias)
    return model


for _name, _blocks, _bottleneck in (("preresnet110", 18, False), ("preresnet110_bottleneck", 12, True), ("preresnet164", 18, True)):
    register(_name, family="preresnet", min_size=1, fixed={"blocks": _blocks, "bottleneck": _bottleneck})(preresnet)
for _depth, _width in ((16, 8), (28, 10)):
    register(f"wrn_{_depth}_{_width}", family="preresnet", min_size=1, fixed={"blocks": (_depth - 4) // 6}, defaults={"width": _width})(
        wide_resnet
    )
