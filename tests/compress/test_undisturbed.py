"""Oracle: the buffers of a network before and after: the same tensors with the same shapes and values, whatever its forward pass did to them."""

import pytest
import torch
from torch import nn

from compress.curvature import collect
from compress.undisturbed import undisturbed


class Careless(nn.Module):
    """Writes to its buffers in every way: in place, by replacing them, by resizing them; one of them cannot be written to."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(1).expand(4))
        self.register_buffer("late", None)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.late = x.detach().sum(0)
        self.seen.resize_(5).fill_(7)
        self.last = x.detach()[0]
        self.norm(self.layer(x * self.mask))
        raise ValueError("of the user")


def state(model):
    return {name: None if buffer is None else (id(buffer), buffer.shape, buffer.stride(), buffer.tolist()) for module in model.modules()
            for name, buffer in module._buffers.items()}


def within(model, x):
    with undisturbed(model):
        model.train()
        model(x)


@pytest.mark.parametrize("run", [within, lambda model, x: collect(model, [x], training=True)], ids=["undisturbed", "collect"])
def test_buffers_are_given_back_although_the_network_raises(run):
    model = Careless()
    before = state(model)
    with pytest.raises(ValueError, match="of the user"):
        run(model, torch.randn(8, 4))
    assert state(model) == before
    assert model.mask.stride() == (0,) and model.late is None
