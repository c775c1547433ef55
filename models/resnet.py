"""ResNets of four stages for small images: resnet18, resnet34, resnet50, resnet101, resnet152 with a CIFAR stem.

He et al. 2016 (arXiv:1512.03385), the ImageNet networks, with a 3x3 stem of stride 1 and no max-pool in front of the stages of 64, 128, 256
and 512 channels (times `width`; times 4 behind bottleneck blocks, whose stride sits on the 3x3 convolution). Where channels or image size
change, the shortcut is a 1x1 convolution with BatchNorm; elsewhere nothing, or with `skip_scale` a scale per channel, fixed at 1 until it is pruned.
`inner_width` multiplies the channels inside bottleneck blocks only (Zagoruyko & Komodakis 2016, arXiv:1605.07146: 2 is "wide ResNet-50-2").
Initialisation: PyTorch's default.

Counts at 32x32 and 3 input channels, 10 classes:

| name | blocks | parameters | MACs |
|---|---|---|---|
| resnet18 | 2 2 2 2 basic | 11,173,962 | 555,422,720 |
| resnet34 | 3 4 6 3 basic | 21,282,122 | 1,159,402,496 |
| resnet50 | 3 4 6 3 bottleneck | 23,520,842; 23,705,252 for 100 classes | 1,297,829,888 |
| resnet101 | 3 4 23 3 bottleneck | 42,512,970 | 2,509,983,744 |
| resnet152 | 3 8 36 3 bottleneck | 58,156,618 | 3,722,137,600 |
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import identity
from .options import scaled
from .registry import register


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`, `[n, c_in, h, w] -> [n, c_out, ceil(h / stride), ceil(w / stride)]`.

    `widths`: channels from the input to the output, one convolution with BatchNorm between each two; two 3x3 convolutions for one inner
    width (basic), 1x1 - 3x3 - 1x1 for two (bottleneck). `stride`: of the first 3x3 convolution.
    """

    def __init__(self, widths: tuple[int, ...], stride: int, skip_scale: bool = False) -> None:
        super().__init__()
        self.bottleneck = len(widths) == 4
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            kernel = 1 if self.bottleneck and index != 2 else 3
            step = stride if index == (2 if self.bottleneck else 1) else 1
            self.add_module(f"conv{index}", nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(after))
        if stride == 1 and widths[0] == widths[-1]:
            self.shortcut: nn.Module = identity(widths[-1], skip_scale)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """The network; `[n, in_channels, h, w] -> [n, num_classes]`. `channels`: of the four stages of `blocks` blocks each."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        bottleneck: bool,
        inner_width: float = 1,
        skip_scale: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        before = channels[0]
        stages = []
        for index, (count, base) in enumerate(zip(blocks, channels, strict=True)):
            stage, inner = [], scaled(base, inner_width)
            for block in range(count):
                widths = (before, inner, inner, 4 * base) if bottleneck else (before, base, base)
                stage.append(ResidualBlock(widths, stride=2 if index > 0 and block == 0 else 1, skip_scale=skip_scale))
                before = widths[-1]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def basic_resnet(num_classes: int, in_channels: int, blocks: tuple[int, ...], width: float = 1, skip_scale: bool = False) -> ResNet:
    """A ResNet of four stages of basic blocks; `width` multiplies the channels 64, 128, 256 and 512."""
    return ResNet(num_classes, in_channels, blocks, _channels(width), False, skip_scale=skip_scale)


def bottleneck_resnet(
    num_classes: int, in_channels: int, blocks: tuple[int, ...], width: float = 1, inner_width: float = 1, skip_scale: bool = False
) -> ResNet:
    """A ResNet of four stages of bottleneck blocks; `inner_width` multiplies the channels inside the blocks once more."""
    return ResNet(num_classes, in_channels, blocks, _channels(width), True, inner_width, skip_scale)


def _channels(width: float) -> tuple[int, ...]:
    return tuple(scaled(base, width) for base in (64, 128, 256, 512))


for _name, _blocks, _builder in (
    ("resnet18", (2, 2, 2, 2), basic_resnet),
    ("resnet34", (3, 4, 6, 3), basic_resnet),
    ("resnet50", (3, 4, 6, 3), bottleneck_resnet),
    ("resnet101", (3, 4, 23, 3), bottleneck_resnet),
    ("resnet152", (3, 8, 36, 3), bottleneck_resnet),
):
    register(_name, family="resnet", min_size=1, fixed={"blocks": _blocks})(_builder)
