"""Oracle: the same network without activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compress.curvature import collect
from compress.errors import UserError
from tests.compress.curvature.nets import randn


class Net(nn.Module):
    """The first two layers run in a checkpointed region (`reentrant` None: in a plain one)."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.stem, self.a, self.b, self.head = reentrant, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def region(self, x):
        return torch.tanh(self.b(torch.relu(self.a(x))))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = self.region(x) if self.reentrant is None else checkpoint(self.region, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("layers", [None, ["a", "b"], ["b"]])  # with "stem" nothing in the region is the first differentiable output
@pytest.mark.parametrize("fisher, samples", [("exact", 1), ("true", 2)])
def test_what_is_run_again_is_not_counted_again(layers, fisher, samples):
    x = randn(6, 3)
    plain, again = (collect(Net(kind), [x], layers=layers, fisher=fisher, samples=samples, ekfac=True) for kind in (None, False))
    for name in plain:
        assert again[name].positions == 1
        for kind in ("A", "G", "second"):
            torch.testing.assert_close(getattr(again[name], kind), getattr(plain[name], kind))


def test_a_memory_efficient_densenet_has_the_factors_of_a_usual_one():
    models = pytest.importorskip("torchvision.models")
    nets = []
    for efficient in (False, True):
        torch.manual_seed(0)
        nets.append(models.DenseNet(4, (2, 1), 8, num_classes=3, memory_efficient=efficient).double().eval())
    x = randn(2, 3, 32, 32)
    plain, efficient = (collect(net, [x]) for net in nets)
    for name in plain:
        torch.testing.assert_close(efficient[name].A, plain[name].A)
        torch.testing.assert_close(efficient[name].G, plain[name].G)


@pytest.mark.filterwarnings("ignore")
def test_the_kind_without_gradients_of_activations_is_one_sentence():
    with pytest.raises(UserError) as error:
        collect(Net(True), [randn(4, 3)])
    assert "use_reentrant=False" in str(error.value) and "\n" not in str(error.value)
