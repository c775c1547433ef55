"""Parts shared by the families: shortcuts and weight initialisations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadShortcut(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, and zero channels in front of and behind the given ones.

    `[n, c, h, w] -> [n, front + c + back, ceil(h / stride), ceil(w / stride)]`, option A of He et al. 2016 (arXiv:1512.03385, section 4.2).
    `forward` reads only `front`, `back`, `stride` and its input, so that pruning can rewrite `front` and `back`.

    Parameters
    ----------
    in_channels, out_channels:
        Channels of the input and of the output, `out_channels >= in_channels`.
    stride:
        Distance of the pixels that are kept.
    front:
        Zero channels in front; half of the new channels (rounded down) if None.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, front: int | None = None) -> None:
        super().__init__()
        new = out_channels - in_channels
        self.front = new // 2 if front is None else front
        self.back = new - self.front
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        return f"front={self.front}, back={self.back}, stride={self.stride}"


class ChannelScale(nn.Module):
    """`x * weight` with one weight per channel: the identity of a skip path as something that can be pruned.

    `[n, c, ...] -> [n, c, ...]`; Tanaka et al. 2020 (arXiv:2006.05467) put one on every skip path without a convolution. The weights are 1
    and not trained, as theirs; masks may zero them.
    """

    skip_scale = True  # what masks recognise it by, whatever name this package was imported under

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return str(len(self.weight))


def identity(channels: int, scaled: bool) -> nn.Module:
    """What a skip path without a convolution holds: nothing, or a scale per channel."""
    return ChannelScale(channels) if scaled else nn.Identity()


def init_kaiming_fan_in(model: nn.Module) -> None:
    """Normal weights of variance 2 / fan_in in convolutions and linear layers; biases and BatchNorm stay as they are (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def init_kaiming_fan_out(model: nn.Module) -> None:
    """Normal weights of variance 2 / (k k c_out) in every convolution; everything else stays as it is (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
