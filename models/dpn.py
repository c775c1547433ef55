"""Dual path networks for 32x32 images: dpn26 and dpn92.

Chen et al. 2017 (arXiv:1707.01629), with a 3x3 stem of 64 channels and no max-pool. A block's 1x1 - 3x3 (32 groups) - 1x1 branch gives
`r + d` channels: the first r are added to the first r of the block's input (residual path), the other d are appended to the input's other
channels (dense path). The four stages have r = 256, 512, 1024, 2048 with 96, 192, 384, 768 channels inside and d = 16, 32, 24, 128;
the first block of each stage has a 1x1 convolution with BatchNorm to r + d channels as shortcut. Initialisation: PyTorch's default.

Counts at 32x32 and 3 input channels, 10 classes:

| name | blocks | parameters | MACs | width of the last feature |
|---|---|---|---|---|
| dpn26 | 2 2 2 2 | 11,574,842 | 665,050,880 | 2,432 |
| dpn92 | 3 4 20 3 | 34,236,634; 34,467,124 for 100 classes | 2,042,422,272 | 2,560 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import register

GROUPS = 32
INNER = (96, 192, 384, 768)
RESIDUAL = (256, 512, 1024, 2048)
DENSE = (16, 32, 24, 128)


class DualPathBlock(nn.Module):
    """One block, `[n, c_in, h, w] -> [n, c_short + dense, ...]`, where the shortcut gives c_short channels.

    The attribute `split` is the number of residual channels r: `forward` slices the channels of branch and shortcut there. Removing
    residual channels must lower it by as many; nothing else in `forward` depends on channel numbers.
    """

    def __init__(self, in_channels: int, inner: int, residual: int, dense: int, stride: int, first: bool) -> None:
        super().__init__()
        self.split = residual
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=GROUPS, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, residual + dense, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(residual + dense)
        self.shortcut: nn.Module = nn.Identity()
        if first:
            projection = nn.Conv2d(in_channels, residual + dense, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(residual + dense))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        skip = self.shortcut(x)
        added = skip[:, : self.split] + out[:, : self.split]
        return F.relu(torch.cat([added, skip[:, self.split :], out[:, self.split :]], dim=1))


class DPN(nn.Module):
    """The network; `[n, in_channels, h, w] -> [n, num_classes]`."""

    def __init__(self, num_classes: int, in_channels: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        before = 64
        self.conv1 = nn.Conv2d(in_channels, before, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        stages = []
        for index, (count, inner, residual, dense) in enumerate(zip(blocks, INNER, RESIDUAL, DENSE, strict=True)):
            stage = []
            for block in range(count):
                stage.append(DualPathBlock(before, inner, residual, dense, stride=2 if index > 0 and block == 0 else 1, first=block == 0))
                before = residual + (block + 2) * dense
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def dpn(num_classes: int, in_channels: int, blocks: tuple[int, ...]) -> DPN:
    """A dual path network of four stages of `blocks` blocks each."""
    return DPN(num_classes, in_channels, blocks)


register("dpn26", family="dpn", min_size=1, fixed={"blocks": (2, 2, 2, 2)})(dpn)
register("dpn92", family="dpn", min_size=1, fixed={"blocks": (3, 4, 20, 3)})(dpn)
