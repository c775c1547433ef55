"""Small networks shared by the tests of weight criteria and masks."""

import torch
from torch import nn


def chain(generator: torch.Generator, bias: bool = False, norm: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolutional chain on [3, 8, 8] inputs with 4 classes; BatchNorm with random positive statistics."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 6), (6, 8), (8, 8)):
        layers.append(nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(c_out), nn.ReLU()] if norm else [nn.ReLU()]
    layers[4 if not norm else 5] = nn.Sequential(layers[4 if not norm else 5], nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=bias)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


class Residual(nn.Module):
    """Two convolutions around which a skip runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.a = nn.Conv2d(5, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))


def data(
    generator: torch.Generator, n: int = 12, batches: int = 2, dtype: torch.dtype = torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of random [n, 3, 8, 8] inputs with 4 classes."""
    return [
        (torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(4, (n,), generator=generator)) for _ in range(batches)
    ]
