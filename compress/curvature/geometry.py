"""What the statistics need to know of a Linear, a Conv2d or a factorized block: its window, its groups, its bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from compress.decompose.modules import FactorizedConv2d, FactorizedLinear, layer_bias

BLOCKS = (FactorizedConv2d, FactorizedLinear)
KINDS = (nn.Conv2d, nn.Linear, *BLOCKS)


@dataclass(frozen=True)
class Geometry:
    """A layer as a window that reads [channels, kh, kw] and writes `outputs` numbers; a linear layer has the window (1, 1).

    `padding` is (left, right, top, bottom) as `torch.nn.functional.pad` takes it.
    """

    convolution: bool
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    padding_mode: str
    groups: int
    bias: bool

    @property
    def window(self) -> int:
        """Inputs that one output reads: c / groups * kh * kw."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def offsets(self) -> int:
        """kh * kw."""
        return self.kernel[0] * self.kernel[1]

    def pad(self, x: Tensor) -> Tensor:
        """The input [b, c, h, w] with its borders filled as the layer fills them."""
        if not any(self.padding):
            return x
        return functional.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def positions(self, padded: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of windows on a padded input of this height and width."""
        return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True))


def geometry(module: nn.Module) -> Geometry:
    """The geometry of a Linear, Conv2d (subclasses included) or block."""
    bias = layer_bias(module) is not None
    if not hasattr(module, "kernel_size"):
        return Geometry(False, module.in_features, module.out_features, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), "zeros", 1, bias)
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in totals)
        padding = (*columns, *rows)
    elif module.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        padding = (module.padding[1],) * 2 + (module.padding[0],) * 2
    return Geometry(
        True,
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.dilation),
        padding,
        module.padding_mode,
        module.groups,
        bias,
    )
