"""ResNets of three stages for 32x32 images: resnet20/32/44/56/110/1202, the wider resnet32x2 and resnet32x4.

He et al. 2016 (arXiv:1512.03385, section 4.2): a 3x3 convolution, three stages of n = (depth - 2) / 6 basic blocks with 16, 32 and 64
channels (times `width`), global average pooling, one linear layer. Where a block halves the image, the shortcut is

* `"A"`: `PadShortcut`, every second pixel, new zero channels half in front and half behind; no parameters;
* `"conv"`: 1x1 convolution with BatchNorm;
* `"avgpool"`: 2x2 average pooling, new zero channels behind (the variant of the weight-level pruning study); counts as for `"A"`.

With `skip_scale` the other shortcuts are a scale per channel, fixed at 1 until it is pruned, instead of nothing (the form of the study of pruning at
initialisation, whose counts include them: 240 more for resnet20, 22,304 for resnet1202).

Initialisation: normal weights of variance 2 / fan_in in convolutions and the linear layer; BatchNorm (1, 0).

Counts at 32x32 and 3 input channels, 10 classes; MACs of convolutions and linear layers (64 * width * num_classes more per class):

| name | shortcut | parameters | MACs |
|---|---|---|---|
| resnet20 | A / conv | 269,722 / 272,474 | 40,551,040 / 40,813,184 |
| resnet32 | A / conv | 464,154 / 466,906 | 68,862,592 / 69,124,736 |
| resnet44 | A / conv | 658,586 / 661,338 | 97,174,144 / 97,436,288 |
| resnet56 | A / conv | 853,018 / 855,770 | 125,485,696 / 125,747,840 |
| resnet110 | A / conv | 1,727,962 / 1,730,714 | 252,887,680 / 253,149,824 |
| resnet1202 | A / conv | 19,421,274 / 19,424,026 | 2,829,238,912 / 2,829,501,056 |
| resnet32x2 (32/64/128) | conv | 1,860,522 | 275,612,928 |
| resnet32x4 (64/128/256) | conv | 7,427,914; 7,451,044 for 100 classes | 1,100,679,680; 1,100,702,720 for 100 classes |
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import PadShortcut, identity, init_kaiming_fan_in
from .options import choice, scaled
from .registry import register

SHORTCUTS = ("A", "conv", "avgpool")


def _shortcut(kind: str, in_channels: int, channels: int, stride: int, skip_scale: bool) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return identity(channels, skip_scale)
    if kind == "A":
        return PadShortcut(in_channels, channels, stride)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    # Rounding up keeps odd images as large as the strided convolution makes them.
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), PadShortcut(in_channels, channels, stride=1, front=0))


class BasicBlock(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`, `[n, c_in, h, w] -> [n, c, ceil(h / stride), ceil(w / stride)]`."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str, skip_scale: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride, skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The network; `[n, in_channels, h, w] -> [n, num_classes]`. `channels`: of the three stages."""

    def __init__(
        self, num_classes: int, in_channels: int, blocks: int, channels: tuple[int, int, int], shortcut: str, skip_scale: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.layer1 = self._stage(channels[0], channels[0], blocks, 1, shortcut, skip_scale)
        self.layer2 = self._stage(channels[0], channels[1], blocks, 2, shortcut, skip_scale)
        self.layer3 = self._stage(channels[1], channels[2], blocks, 2, shortcut, skip_scale)
        self.linear = nn.Linear(channels[2], num_classes)
        init_kaiming_fan_in(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: str, skip_scale: bool) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, shortcut, skip_scale)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut, skip_scale) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet_cifar(
    num_classes: int, in_channels: int, depth: int, width: float = 1, shortcut: str = "A", skip_scale: bool = False
) -> CifarResNet:
    """A ResNet of `depth` = 6 n + 2 layers with 16, 32 and 64 channels times `width`; `shortcut`: "A", "conv" or "avgpool".

    `skip_scale`: a scale per channel (`layers.ChannelScale`) on the skip paths that are otherwise the identity.
    """
    choice("shortcut", shortcut, SHORTCUTS)
    channels = (scaled(16, width), scaled(32, width), scaled(64, width))
    return CifarResNet(num_classes, in_channels, (depth - 2) // 6, channels, shortcut, skip_scale)


for _depth in (20, 32, 44, 56, 110, 1202):
    register(f"resnet{_depth}", family="resnet_cifar", min_size=1, fixed={"depth": _depth})(resnet_cifar)
for _width in (2, 4):
    register(
        f"resnet32x{_width}", family="resnet_cifar", min_size=1, fixed={"depth": 32}, defaults={"width": _width, "shortcut": "conv"}
    )(resnet_cifar)
