"""VGG networks for 32x32 images: vgg11/13/16/19 (BatchNorm), vgg11_plain..vgg19_plain (none), vgg16_weight_level;
and vgg11_fc3..vgg19_fc3 and vgg11_fc3_plain..vgg19_fc3_plain for 64x64 images.

Simonyan & Zisserman 2015 (arXiv:1409.1556): 3x3 convolutions of 64, 128, 256, 512 and 512 channels, a 2x2 max-pool after each group, and
one linear layer. `variant` chooses between two published forms with equal counts:

* `"max"`: a max-pool after every group, so that the smallest image is 32x32; PyTorch's default initialisation;
* `"average"`: average instead of max pooling after the last group (16x16 or more); normal weights of variance 2 / fan_in in convolutions
  and the linear layer, zero biases, BatchNorm (1, 0). This is the form of the pruning-at-initialisation study.

Default: `"max"` with BatchNorm, `"average"` without. Both have biases in the convolutions.

`vgg16_weight_level` is the VGG-16 of the weight-level pruning study: no biases in the convolutions, average pooling at the end, and
the head Linear(512, 512) - BatchNorm - ReLU - Linear(512, classes). Initialisation: convolutions normal of variance 2 / (k k c_out), linear
layers normal of standard deviation 0.01 with zero bias, BatchNorm scale 0.5 and shift 0.

The `_fc3` networks are those of the study of pruning at initialisation on Tiny-ImageNet: a max-pool after every group, no average pooling,
and the head Linear(f, h) - ReLU - Dropout - Linear(h, h) - ReLU - Dropout - Linear(h, classes) on the f = 512 (image_size / 32)^2 features,
h = f / 2 = 1,024 at 64x64. Their initialisation: as that of `vgg16_weight_level`, BatchNorm (1, 0).

Counts at 32x32 and 3 input channels, 10 classes (513 parameters and 512 MACs more per class):

| name | parameters with / without BatchNorm | MACs |
|---|---|---|
| vgg11 | 9,231,114 / 9,225,610 | 152,769,536 |
| vgg13 | 9,416,010 / 9,410,122 | 228,267,008 |
| vgg16 | 14,728,266 / 14,719,818 | 313,201,664 |
| vgg19 | 20,040,522 / 20,029,514 | 398,136,320 |
| vgg16_weight_level | 14,987,722 | 313,463,808 |
| vgg16_fc3 (64x64, 200 classes) | 18,075,912 / 18,067,464 | 1,256,136,704 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import UserError

from .layers import init_kaiming_fan_in, init_kaiming_fan_out
from .options import choice, scaled, whole
from .registry import register

VARIANTS = ("max", "average")
# Convolutions per group.
GROUPS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """`features` (convolutions and pooling), global average pooling (or none), `classifier`; `[n, in_channels, h, w] -> [n, num_classes]`.

    Parameters
    ----------
    groups, channels:
        Convolutions, and channels of each of them, per group.
    batch_norm, bias:
        Whether convolutions are followed by BatchNorm, and whether they have biases.
    last_max_pool:
        Whether the last group ends with a max-pool too.
    classifier:
        The head, `[n, channels[-1]] -> [n, num_classes]`.
    average_pool:
        Whether the head reads the mean over the image, or every position of it.
    """

    def __init__(
        self,
        in_channels: int,
        groups: Sequence[int],
        channels: Sequence[int],
        *,
        batch_norm: bool,
        bias: bool,
        last_max_pool: bool,
        classifier: nn.Module,
        average_pool: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (count, width) in enumerate(zip(groups, channels, strict=True)):
            for _ in range(count):
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=bias))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                in_channels = width
            if last_max_pool or index + 1 < len(groups):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1) if average_pool else nn.Identity()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _channels(width: float) -> list[int]:
    return [scaled(base, width) for base in (64, 128, 256, 512, 512)]


def vgg(num_classes: int, in_channels: int, depth: int, batch_norm: bool, variant: str = "max", width: float = 1) -> VGG:
    """The VGG of `depth` layers; `variant`: "max" or "average" (pooling after the last group); `width` multiplies the channels."""
    choice("variant", variant, VARIANTS)
    channels = _channels(width)
    model = VGG(
        in_channels,
        GROUPS[depth],
        channels,
        batch_norm=batch_norm,
        bias=True,
        last_max_pool=variant == "max",
        classifier=nn.Linear(channels[-1], num_classes),
    )
    if variant == "average":
        init_kaiming_fan_in(model)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.zeros_(module.bias)
    return model


def vgg16_weight_level(num_classes: int, in_channels: int, width: float = 1) -> VGG:
    """The VGG-16 with a head of two linear layers; `width` multiplies the channels (the hidden layer of the head included)."""
    channels = _channels(width)
    last = channels[-1]
    head = nn.Sequential(nn.Linear(last, last), nn.BatchNorm1d(last), nn.ReLU(), nn.Linear(last, num_classes))
    model = VGG(in_channels, GROUPS[16], channels, batch_norm=True, bias=False, last_max_pool=False, classifier=head)
    init_kaiming_fan_out(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return model


def vgg_fc3(num_classes: int, in_channels: int, depth: int, batch_norm: bool, image_size: int = 64, width: float = 1) -> VGG:
    """The VGG of `depth` layers with a head of three linear layers on all features; `width` multiplies the channels, the head's included."""
    channels = _channels(width)
    features = channels[-1] * (_side(image_size) // 32) ** 2
    hidden = features // 2
    head = nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, num_classes),
    )  # fmt: skip
    model = VGG(
        in_channels, GROUPS[depth], channels, batch_norm=batch_norm, bias=True, last_max_pool=True, classifier=head, average_pool=False
    )
    init_kaiming_fan_out(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def _side(image_size: Any) -> int:
    if whole("image_size", image_size) < 32:
        raise UserError(f"Model option 'image_size' is {image_size}; five halvings need at least 32 pixels.")
    return image_size


def _fixed_side(options: Mapping[str, Any]) -> int:
    return _side(options["image_size"])


def _min_size(options: Mapping[str, Any]) -> int:
    return 32 if options["variant"] == "max" else 16


for _depth in GROUPS:
    register(f"vgg{_depth}", family="vgg", min_size=_min_size, fixed={"depth": _depth, "batch_norm": True})(vgg)
    register(
        f"vgg{_depth}_plain",
        family="vgg",
        min_size=_min_size,
        fixed={"depth": _depth, "batch_norm": False},
        defaults={"variant": "average"},
    )(vgg)
    for _name, _norm in ((f"vgg{_depth}_fc3", True), (f"vgg{_depth}_fc3_plain", False)):
        register(_name, family="vgg", min_size=_fixed_side, exact_size=_fixed_side, fixed={"depth": _depth, "batch_norm": _norm})(vgg_fc3)
register("vgg16_weight_level", family="vgg", min_size=16)(vgg16_weight_level)
