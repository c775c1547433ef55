"""Oracle: torch.linalg.lstsq on the patches that the layers really read, and the KKT minimum (tests/oracles/obs.py) of the K-FAC block."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.criteria import CRITERIA
from compress.criteria.second_order import view
from compress.curvature import collect, obs
from compress.graph import trace
from tests.compress.curvature.nets import randn
from tests.oracles.obs import constrained_minimum


class Readers(nn.Module):
    """A residual stream that padded, strided, dilated and grouped convolutions and, flattened, a linear layer read."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False)
        self.strided = nn.Conv2d(6, 5, 3, padding=2, stride=2, dilation=2)
        self.grouped = nn.Conv2d(6, 4, (3, 2), padding=(1, 0), groups=2)
        self.head = nn.Linear(6 * 9 + 5 + 4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.tanh(self.inner(x))
        strided, grouped = (torch.relu(layer(x)).mean((2, 3)) for layer in (self.strided, self.grouped))
        return self.head(torch.cat([functional.adaptive_avg_pool2d(x, 3).flatten(1), strided, grouped], 1))


class Concat(nn.Module):
    """Two groups that meet in the layers which read them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.c, self.head = nn.Conv2d(9, 6, 3, padding=1, stride=2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], 1))).mean((2, 3)))


X = randn(80, 2, 7, 7)
BATCHES = [(X[:50], torch.arange(50) % 3), (X[50:], torch.arange(30) % 3)]


def build(kind):
    torch.manual_seed(0)
    return kind().double().eval()


def patches(module, x):
    """What each group of the layer reads, [groups, positions of all images, inputs], with ones for the bias."""
    if isinstance(module, nn.Linear):
        rows = x[None]
    else:
        rows = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = rows.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return rows if module.bias is None else torch.cat([rows, torch.ones(*rows.shape[:2], 1)], 2)


def weights(module):
    """[groups, outputs, inputs] with the bias as last column."""
    groups = getattr(module, "groups", 1)
    W = module.weight.detach().flatten(1)
    if module.bias is not None:
        W = torch.cat([W, module.bias.detach()[:, None]], 1)
    return W.unflatten(0, (groups, -1))


def inputs_of(net, names):
    seen = {}
    handles = [net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
               for name in names]
    net(X)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind, removal, readers", [
    (Readers, {"stem.weight": [1]}, ["inner", "strided", "grouped", "head"]),
    (Concat, {"a.weight": [0, 3], "b.weight": [2]}, ["c"]),
])
def test_every_reader_becomes_the_least_squares_fit_on_its_real_patches(kind, removal, readers):
    net = build(kind)
    graph, new = trace(net, X[:1]), copy.deepcopy(net)
    CRITERIA["kron_obs"].compensate(graph, new, removal, BATCHES, torch.Generator().manual_seed(0), damping=1e-12)
    groups = {group.name: group for group in graph.groups}
    read = inputs_of(net, readers)
    touched = {key.rpartition(".")[0] for key, value in new.state_dict().items() if not torch.equal(value, net.state_dict()[key])}
    assert touched == set(readers)
    for name in readers:
        module = net.get_submodule(name)
        offsets = module.weight[0, 0].numel()
        channels = torch.cat([m.indices[removed].flatten() for group, removed in removal.items() for m in groups[group].members
                              if m.parameter == f"{name}.weight" and m.role == "in"])
        gone = (channels[:, None] * offsets + torch.arange(offsets)).flatten()
        for rows, W, ours in zip(patches(module, read[name]), weights(module), weights(new.get_submodule(name)), strict=True):
            kept = torch.ones(W.shape[1], dtype=torch.bool)
            kept[gone] = False
            wanted = rows @ W.T
            best = torch.linalg.lstsq(rows[:, kept], wanted, driver="gelsd").solution
            fit, ideal, cut = ((rows[:, kept] @ solution - wanted).norm() for solution in (ours[:, kept].T, best, W[:, kept].T))
            torch.testing.assert_close(fit, ideal, rtol=1e-6, atol=1e-8)
            assert fit < 0.95 * cut and torch.equal(ours[:, ~kept], W[:, ~kept])


@pytest.mark.parametrize("name", ["kron_obd", "kron_obs", "c_obs"])
def test_scores_of_a_stream_add_what_its_columns_cost_in_every_reader(name):
    net = build(Readers)
    graph, factors = trace(net, X[:1]), collect(net, BATCHES, fisher="exact")
    ours = CRITERIA[name].score(graph, net, BATCHES, functional.cross_entropy, side="consumer", fisher="exact", damping=1e-3)["stem.weight"]
    group = next(group for group in graph.groups if group.name == "stem.weight")
    expected = torch.zeros(group.size, dtype=torch.float64)
    for member in (m for m in group.members if m.role == "in"):
        layer = view(net.get_submodule(member.parameter.removesuffix(".weight")), factors[member.parameter.removesuffix(".weight")])
        for W, A, G in zip(layer.W, layer.A, layer.G, strict=True):
            inverse_a, inverse_g = (torch.linalg.inv(m + 1e-3 * m.diagonal().mean() * torch.eye(len(m))) for m in (A, G))
            for channel in range(group.size):
                columns = (member.indices[channel][:, None] * layer.offsets + torch.arange(layer.offsets)).flatten()
                part = W[:, columns]
                if name == "c_obs":
                    value = (part.square() / (inverse_g.diagonal()[:, None] * inverse_a.diagonal()[columns])).sum()
                else:
                    block = A[columns][:, columns] if name == "kron_obd" else torch.linalg.inv(inverse_a[columns][:, columns])
                    value = (G @ part @ block * part).sum()
                expected[channel] += value / 2
    torch.testing.assert_close(ours, expected)


def test_consumer_scores_are_the_kkt_minimum_of_the_kfac_block():
    net = build(Concat)
    entry, w = collect(net, BATCHES, fisher="exact")["c"], weights(net.c)[0]
    places = torch.arange(w.numel()).reshape(w.shape)
    damping = 1e-9
    A = entry.A + damping * entry.A.diagonal().mean() * torch.eye(len(entry.A))
    ours = CRITERIA["kron_obs"].score(
        trace(net, X[:1]), net, BATCHES, functional.cross_entropy, side="consumer", fisher="exact", damping=damping)
    for group, channel, position in (("a.weight", 2, 2), ("b.weight", 1, 6)):
        removed = places[:, position * 9:position * 9 + 9].flatten()
        dw, _ = constrained_minimum(w.flatten(), torch.kron(entry.G, A), removed)
        torch.testing.assert_close(ours[group][channel], dw @ torch.kron(entry.G, A) @ dw / 2, rtol=1e-5, atol=0)


def test_a_layer_that_several_groups_read_is_inverted_once(monkeypatch):
    net, calls = build(Concat), []
    inverse = obs.inverse
    monkeypatch.setattr(obs, "inverse", lambda matrix, damping, name: calls.append((name, len(matrix))) or inverse(matrix, damping, name))
    CRITERIA["kron_obs"].score(trace(net, X[:1]), net, BATCHES, functional.cross_entropy, side="consumer")
    assert sorted(calls) == [("input moment", 7), ("input moment", 82)]


class Failing(nn.Module):
    """Changes a buffer, and fails on the second batch."""

    def __init__(self, net):
        super().__init__()
        self.net, self.norm = net, nn.BatchNorm2d(2).double()

    def forward(self, x):
        self.norm.running_mean += 1
        if x.abs().max() > 100:
            raise ValueError("a fault")
        return self.net(self.norm(x))


SCORES = ["kron_obs", "c_obs", "c_obd", "woodfisher", "taylor", "hessian_trace"]


@pytest.mark.parametrize("name, compensates", [*((name, False) for name in SCORES),
                                               *((name, True) for name in ("kron_obs", "c_obs", "woodfisher"))])
def test_the_network_is_left_as_it_was_when_it_raises(name, compensates):
    model = Failing(build(Concat))
    graph = trace(model, X[:1])
    model.train()
    model.net.head.eval()
    model.net.a.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags, frozen = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    options = {"block": "layer"} if name == "woodfisher" else {}
    batches = [BATCHES[0], (BATCHES[1][0] * 1000, BATCHES[1][1])]
    with pytest.raises(ValueError, match="a fault"):
        if compensates:
            CRITERIA[name].compensate(graph, model, {"net.a.weight": [1]}, batches, **options)
        else:
            CRITERIA[name].score(graph, model, batches, functional.cross_entropy, torch.Generator().manual_seed(0), **options)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == frozen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_c_obd_of_a_stream_adds_the_squared_gradients_of_its_layers():
    net = build(Readers)
    graph = trace(net, X[:1])
    squares = {name: 0 for name in ("stem", "inner")}
    for images, labels in BATCHES:
        for image, label in zip(images, labels, strict=True):
            loss = functional.cross_entropy(net(image[None]), label[None])
            for name in squares:
                gradient, = torch.autograd.grad(loss, net.get_submodule(name).weight, retain_graph=True)
                squares[name] = squares[name] + gradient.square() / len(X)
    losses = [(net.get_submodule(name).weight.detach().square() * square).flatten(1).sum(1) / 2 for name, square in squares.items()]
    group = next(group for group in graph.groups if group.name == "stem.weight")
    members = [m for m in group.members if m.role == "out" and m.parameter.endswith("weight")]
    assert [m.parameter for m in members] == ["stem.weight", "inner.weight"]
    expected = sum(loss[m.indices].sum(1) for loss, m in zip(losses, members, strict=True))
    ours = CRITERIA["c_obd"].score(graph, net, BATCHES, functional.cross_entropy, fisher="empirical")["stem.weight"]
    torch.testing.assert_close(ours, expected)
