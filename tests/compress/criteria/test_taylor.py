"""Oracle: finite differences of the loss, loops over samples with `backward`, and a gate behind BatchNorm equal to what reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compress.criteria import CRITERIA
from compress.criteria.linearize import batch_products
from compress.errors import UserError
from tests.compress.criteria.nets import make_batches, make_graph, make_net

KINDS = {"gate": "in", "producer": "out"}


def scaled(net, members, channel, factor):
    """A copy of the network in evaluation mode with one channel's slices multiplied by `factor`."""
    net = copy.deepcopy(net).eval()
    for member in members:
        index = [slice(None)] * net.get_parameter(member.parameter).dim()
        index[member.dim] = member.indices[channel]
        net.get_parameter(member.parameter).data[tuple(index)] *= factor
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_first_order_change_of_the_loss(kind):
    net, (x, y), step = make_net(), make_batches()[0], 1e-5
    for group in make_graph().groups[:2]:
        members = [m for m in group.members if m.role == KINDS[kind]]
        (count, products), = batch_products(net, {group.name: members}, [(x, y)], cross_entropy)
        assert count == 4
        for channel in range(group.size):
            up, down = (cross_entropy(scaled(net, members, channel, 1 + t)(x), y) for t in (step, -step))
            assert float(products[group.name][channel]) == pytest.approx((up - down).item() / (2 * step), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_slices_changes_the_loss_by_minus_the_product_to_first_order(kind):
    # Shrinking the slices makes the remainder quadratically small: product + change = O(size^2).
    net, (x, y) = make_net().requires_grad_(False), make_batches()[0]
    group = make_graph().groups[1]
    members = [m for m in group.members if m.role == KINDS[kind]]
    remainders = []
    for size in (1e-2, 1e-3):
        small = scaled(net, members, 0, size)
        (_, products), = batch_products(small, {group.name: members}, [(x, y)], cross_entropy)
        change = cross_entropy(scaled(small, members, 0, 0.0)(x), y) - cross_entropy(small(x), y)
        remainders.append(abs(float(change + products[group.name][0])))
    assert remainders[1] < 0.05 * remainders[0]


@pytest.mark.parametrize("kind", [*KINDS, "norm"])
def test_taylor_fo_equals_loops_over_batches(kind):
    net, batches = make_net(), make_batches()
    scores = CRITERIA["taylor_fo"].score(make_graph(), net, batches, cross_entropy, slices=kind)
    for group in make_graph().groups[:2]:
        members = [m for m in group.members if m.role == KINDS.get(kind)
                   or (kind == "norm" and m.parameter.split(".")[0].startswith("bn") and "running" not in m.parameter)]
        expected, total = [0.0] * group.size, 0
        for x, y in batches:
            clone = copy.deepcopy(net).eval()
            cross_entropy(clone(x), y).backward()
            total += len(x)
            for channel in range(group.size):
                product = 0.0
                for member in members:
                    weight = clone.get_parameter(member.parameter)
                    for index in member.indices[channel]:
                        product += (weight.grad * weight).select(member.dim, int(index)).sum().item()
                expected[channel] += len(x) * product**2
        assert scores[group.name].tolist() == pytest.approx([v / total for v in expected], rel=1e-9)


def test_the_readers_sum_is_the_gate_behind_batchnorm():
    # ReLU is positively homogeneous: scaling the BatchNorm's output equals scaling what reads it.
    net, batches = make_net(), make_batches()
    gate, norm = (CRITERIA["taylor_fo"].score(make_graph(), net, batches, cross_entropy, slices=kind)["conv2.weight"]
                  for kind in ("gate", "norm"))
    assert torch.allclose(gate, norm, rtol=1e-9)


def by_samples(net, batches, where):
    """Mean over samples of |mean over positions of z dL/dz| at the outputs of the modules `where`, {name: list}."""
    sums, total = {}, 0
    for images, labels in batches:
        for x, y in zip(images, labels):
            clone, kept = copy.deepcopy(net).eval(), {}
            for name in where:
                clone.get_submodule(name).register_forward_hook(
                    lambda m, i, out, name=name: kept.__setitem__(name, out) or out.retain_grad())
            cross_entropy(clone(x[None]), y[None]).backward()
            total += 1
            for name, z in kept.items():
                for channel in range(z.shape[1]):
                    value = (z * z.grad)[0, channel].mean().abs()
                    sums.setdefault(name, [0.0] * z.shape[1])[channel] += value.item()
    return {name: [v / total for v in values] for name, values in sums.items()}


@pytest.mark.parametrize("site, where", [("norm", {"conv1.weight": ["bn1", "bn3"], "conv2.weight": ["bn2"]}),
                                         ("producer", {"conv1.weight": ["conv1", "conv3"], "conv2.weight": ["conv2"]})])
@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_taylor_2016_equals_loops_over_samples(site, where, normalize):
    batches = make_batches()
    scores = CRITERIA["taylor_2016"].score(make_graph(), make_net(inplace=True), batches, cross_entropy, site=site, normalize=normalize)
    expected = by_samples(make_net(inplace=False), batches, [name for names in where.values() for name in names])
    for group, names in where.items():
        layers = [torch.tensor(expected[name], dtype=torch.float64) for name in names]
        values = torch.stack([layer / layer.norm() if normalize == "l2" else layer for layer in layers]).mean(0)
        assert torch.allclose(scores[group], values, rtol=1e-9)


def test_taylor_2016_does_not_depend_on_how_samples_are_batched():
    (x, y), = make_batches((11,))
    split = [(x[:2], y[:2]), (x[2:9], y[2:9]), (x[9:], y[9:])]
    a, b = (CRITERIA["taylor_2016"].score(make_graph(), make_net(), batches, cross_entropy) for batches in ([(x, y)], split))
    assert all(torch.allclose(a[name], b[name], rtol=1e-10) for name in a)


@pytest.mark.parametrize("name, options", [("taylor_2016", {}), ("taylor_fo", {}), ("taylor_fo", {"slices": "norm"})])
def test_a_dead_channel_scores_zero(name, options):
    net = make_net()
    net.bn2.weight.data[3] = net.bn2.bias.data[3] = 0
    scores = CRITERIA[name].score(make_graph(), net, make_batches(), cross_entropy, **options)["conv2.weight"]
    assert scores[3] == 0 and (scores[[0, 1, 2, 4, 5]] > 0).all()


class Failing(nn.Module):
    """Changes its own state, then fails on the second batch."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        self.net.bn1.running_mean += 1
        self.net.bn2.running_var = self.net.bn2.running_var * 2
        if self.calls == 2:
            raise RuntimeError("second batch")
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["taylor_2016", "taylor_fo"])
def test_the_model_is_left_as_it_was(name, fails):
    net = make_net()
    net.bn3.eval()
    net.conv2.weight.requires_grad_(False)
    net.conv3.weight.grad = torch.full_like(net.conv3.weight, 7.0)
    model = Failing(net) if fails else net
    state = {key: value.clone() for key, value in net.state_dict().items()}
    identity = {key: id(value) for key, value in net.named_buffers()}
    flags, frozen = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    graph = make_graph()
    if fails:
        for group in graph.groups:
            for member in group.members:
                member.parameter = f"net.{member.parameter}"
        with pytest.raises(RuntimeError, match="second batch"):
            CRITERIA[name].score(graph, model, make_batches(), cross_entropy)
    else:
        with torch.no_grad():
            CRITERIA[name].score(graph, model, make_batches(), cross_entropy)
    assert [m.training for m in net.modules()] == flags and [p.requires_grad for p in net.parameters()] == frozen
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert {key: id(value) for key, value in net.named_buffers()} == identity
    assert torch.equal(net.conv3.weight.grad, torch.full_like(net.conv3.weight, 7.0))
    assert all(p.grad is None for p in net.parameters() if p is not net.conv3.weight)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("name", ["taylor_2016", "taylor_fo"])
def test_frozen_parameters_score_like_trained_ones(name):
    nets = make_net(), make_net().requires_grad_(False)
    scores = [CRITERIA[name].score(make_graph(), net, make_batches(), cross_entropy) for net in nets]
    assert all(torch.equal(scores[0][group], scores[1][group]) for group in scores[0])


@pytest.mark.parametrize("name", ["taylor_2016", "taylor_fo"])
def test_data_made_in_inference_mode_scores_the_same(name):
    expected = CRITERIA[name].score(make_graph(), make_net(), make_batches(), cross_entropy)
    net = make_net()
    with torch.inference_mode():
        scores = CRITERIA[name].score(make_graph(), net, make_batches(), cross_entropy)
    assert all(torch.equal(scores[group], expected[group]) for group in scores)


@pytest.mark.parametrize("name", ["taylor_2016", "taylor_fo"])
def test_faults_are_one_sentence(name):
    score = CRITERIA[name].score
    poisoned = [(x * float("nan"), y) for x, y in make_batches()]
    for batches, loss, words in [(None, None, "needs calibration"), ([], cross_entropy, "got no batch"),
                                 (poisoned, cross_entropy, "layer 'conv1.weight'"), (make_batches(), lambda out, y: out, "one number")]:
        with pytest.raises(UserError, match=words) as caught:
            score(make_graph(), make_net(), batches, loss)
        assert len(caught.value.faults) == 1


@pytest.mark.parametrize("name, role", [("taylor_2016", None), ("taylor_fo", "in")])
def test_a_group_with_nothing_to_measure_is_refused_or_kept(name, role):
    graph = make_graph()
    graph.groups[1].members = [m for m in graph.groups[1].members if role and m.role != role]
    with pytest.raises(UserError, match="finds nothing to measure in channel group 'conv2.weight'"):
        CRITERIA[name].score(graph, make_net(), make_batches(), cross_entropy)
    assert set(CRITERIA[name].score(graph, make_net(), make_batches(), cross_entropy, missing="keep")) == {"conv1.weight"}


class Windows(nn.Module):
    """Runs one linear layer on windows folded into the batch, twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 5).double()

    def forward(self, x):
        n = len(x)
        windows = x.permute(0, 2, 3, 1).reshape(n * 4, 9, 3)
        z = self.linear(windows) + self.linear(2 * windows)
        return self.head(torch.tanh(z.reshape(n, -1, 4)).mean(1))


def test_windows_in_the_batch_and_repeated_calls():
    model, batches = Windows(), make_batches((3, 2))
    graph = make_graph()
    graph.groups = graph.groups[:1]
    graph.groups[0].members = [m for m in graph.groups[0].members if m.parameter == "conv1.weight"]
    graph.groups[0].members[0].parameter = "linear.weight"
    scores = CRITERIA["taylor_2016"].score(graph, model, batches, cross_entropy, normalize="none")
    expected = torch.zeros(4, dtype=torch.float64)
    for images, labels in batches:
        for x, y in zip(images, labels):
            kept = []
            handle = model.linear.register_forward_hook(lambda m, i, out: kept.append(out) or out.retain_grad())
            cross_entropy(model(x[None]), y[None]).backward()
            handle.remove()
            expected += sum((z * z.grad).sum((0, 1)) for z in kept).abs() / (2 * 36) / 5
    assert torch.allclose(scores["conv1.weight"], expected, rtol=1e-9)


class ImageNorm(nn.LayerNorm):
    """LayerNorm over the channels of images [n, c, h, w]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("norm, shape, axis", [(ImageNorm(4), (2, 4, 3, 4), 1), (nn.LayerNorm(4), (2, 4, 3, 4), -1),
                                               (nn.GroupNorm(2, 4), (2, 4, 3, 3), 1), (nn.BatchNorm1d(4), (2, 4), 1)])
def test_every_kind_of_normalisation_is_measured_at_its_channel_axis(norm, shape, axis):
    graph, x = make_graph(), torch.randn(shape, dtype=torch.float64)
    graph.groups = graph.groups[:1]
    graph.groups[0].members = [m for m in graph.groups[0].members if m.parameter == "bn1.weight"]
    graph.groups[0].members[0].parameter = "weight"
    model = norm.double()
    scores = CRITERIA["taylor_2016"].score(graph, model, [(x, None)], lambda out, y: (out**3).flatten(1).sum(1).mean(), normalize="none")
    z = model.eval()(x).detach().movedim(axis, 1).reshape(2, 4, -1)
    assert torch.allclose(scores["conv1.weight"], (3 * z**3).mean(2).abs().mean(0), rtol=1e-9)


@pytest.mark.parametrize("layer, shape", [(nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 6, 6)), (nn.Conv1d(3, 4, 3), (2, 3, 6)),
                                          (nn.Linear(3, 4), (2, 5, 3))])
def test_every_kind_of_producer_is_measured_at_its_channel_axis(layer, shape):
    model, axis = layer.double(), -1 if isinstance(layer, nn.Linear) else 1
    graph, x = make_graph(), torch.randn(shape, dtype=torch.float64)
    graph.groups = graph.groups[:1]
    graph.groups[0].members = [m for m in graph.groups[0].members if m.parameter == "conv1.weight"]
    graph.groups[0].members[0].parameter, graph.groups[0].members[0].dim = "weight", int(isinstance(layer, nn.ConvTranspose2d))
    scores = CRITERIA["taylor_2016"].score(graph, model, [(x, None)], lambda out, y: (out**3).flatten(1).sum(1).mean(), normalize="none")
    z = model(x).detach().movedim(axis, 1).flatten(2)
    assert torch.allclose(scores["conv1.weight"], (3 * z**3).mean(2).abs().mean(0), rtol=1e-9)


def test_a_channel_with_several_feature_maps_is_their_signed_mean():
    model, graph, x = nn.Linear(3, 4).double(), make_graph(), torch.randn(2, 5, 3, dtype=torch.float64)
    graph.groups = graph.groups[:1]
    graph.groups[0].size = 2
    graph.groups[0].members = graph.groups[0].members[:1]
    graph.groups[0].members[0].parameter, graph.groups[0].members[0].indices = "weight", torch.tensor([[0, 3], [2, 1]])
    scores = CRITERIA["taylor_2016"].score(graph, model, [(x, None)], lambda out, y: (out**3).flatten(1).sum(1).mean(), normalize="none")
    z = model(x).detach()
    expected = [(3 * z[:, :, pair] ** 3).mean((1, 2)).abs().mean().item() for pair in ([0, 3], [2, 1])]
    assert scores["conv1.weight"].tolist() == pytest.approx(expected, rel=1e-9)


class Bypassed(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4).double()

    def forward(self, x):
        return x @ self.linear.weight.T


def test_a_layer_that_never_runs_as_a_module_is_named():
    graph = make_graph()
    graph.groups = graph.groups[:1]
    graph.groups[0].members = graph.groups[0].members[:1]
    graph.groups[0].members[0].parameter = "linear.weight"
    with pytest.raises(UserError, match="No gradient reached layer 'linear' .*outside its module"):
        CRITERIA["taylor_2016"].score(graph, Bypassed(), [(torch.randn(2, 3, dtype=torch.float64), None)], lambda out, y: out.sum())
