"""Oracle: factors by their definition, windows by torch.nn.functional.unfold and gradients by backward, one image and class at a time."""

import pytest
import torch
from torch import nn

from compress.curvature import collect
from tests.compress.curvature.nets import randn

CONVOLUTIONS = {
    "groups, all geometry": dict(kernel_size=(3, 2), padding=(2, 0), stride=(2, 1), dilation=(1, 2), groups=2),
    "depthwise": dict(kernel_size=3, groups=4, padding=1, bias=False),
    "groups, 1x1": dict(kernel_size=1, stride=2, groups=2),
    "usual": dict(kernel_size=3, padding=1),
}


def brute_force(net, name, images):
    """A [groups, d, d] and G [groups, o, o] of a Linear or Conv2d, over all its calls."""
    module, seen = net.get_submodule(name), []
    groups = getattr(module, "groups", 1)

    def hook(_, inputs, output):
        output.retain_grad()
        seen.append((inputs[0].detach(), output))

    handle = module.register_forward_hook(hook)
    A = G = windows = 0
    for x in images:
        for label in range(net(x[None]).shape[1]):
            seen.clear()
            z = net(x[None])
            (-z.log_softmax(1)[0, label]).backward()
            for _, output in seen:
                rows = output.grad.flatten(2)[0] if isinstance(module, nn.Conv2d) else output.grad.flatten(0, -2).T
                rows = rows.reshape(groups, -1, rows.shape[-1])
                G = G + z.detach().softmax(1)[0, label] * rows @ rows.mT
        for value, _ in seen:
            if isinstance(module, nn.Conv2d):
                u = nn.functional.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride)[0]
            else:
                u = value.flatten(0, -2).T
            u = u.reshape(groups, -1, u.shape[-1])
            if module.bias is not None:
                u = torch.cat([u, torch.ones_like(u[:, :1])], 1)
            A, windows = A + u @ u.mT, windows + u.shape[-1]
    handle.remove()
    net.zero_grad()
    return A / len(images), G / windows


def check(net, images, names):
    found = collect(net, [images[:2], images[2:]], fisher="exact")
    for name in names:
        A, G = brute_force(net, name, images)
        torch.testing.assert_close(found[name].A.reshape(A.shape), A)
        torch.testing.assert_close(found[name].G.reshape(G.shape), G)


@pytest.mark.parametrize("case", list(CONVOLUTIONS))
def test_factors_of_convolutions(case):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, **CONVOLUTIONS[case]), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).double()
    check(net, randn(3, 2, 9, 8), ("0", "2", "6"))


class Twice(nn.Module):
    """One convolution called at two resolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.shared, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        x = torch.relu(self.shared(self.stem(x)))
        return self.head(torch.relu(self.shared(x[:, :, ::2, ::2])).mean((2, 3)))


def test_factors_of_a_layer_called_twice():
    check(Twice(), randn(3, 2, 6, 6), ("stem", "shared", "head"))


class Tokens(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.batch_first, self.first, self.second, self.head = batch_first, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_factors_of_linears_on_sequences(batch_first):
    check(Tokens(batch_first), randn(4, 6, 3), ("first", "second", "head"))


@pytest.mark.parametrize("batch_first", [True, False])
def test_sampled_positions_of_linears_on_sequences_are_unbiased(batch_first):
    net, x = Tokens(batch_first), randn(3, 6, 3)
    full, generator = collect(net, [x], fisher="exact"), torch.Generator().manual_seed(1)
    runs = [collect(net, [x], fisher="exact", positions=2, generator=generator) for _ in range(200)]
    for name in ("first", "second"):
        assert runs[0][name].positions == 6
        for kind in ("A", "G"):
            values, exact = torch.stack([getattr(run[name], kind) for run in runs]), getattr(full[name], kind)
            assert (values[0] - exact).norm() > 1e-3 * exact.norm()
            # every entry within 5 standard errors of the exact one
            assert ((values.mean(0) - exact).abs() <= 5 * values.std(0) / len(runs) ** 0.5 + 1e-9).all()
