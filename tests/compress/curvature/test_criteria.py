"""Oracle: exact Fisher blocks (tests/oracles), the KKT minimum, finite differences of the loss, and the network's own outputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.criteria import CRITERIA
from compress.criteria.second_order import view
from compress.curvature import collect, obs
from compress.errors import UserError
from compress.graph import trace
from tests.compress.curvature.nets import randn
from tests.oracles.curvature import empirical_block, ggn_block
from tests.oracles.obs import constrained_minimum, woodfisher_inverse

NAMES = ["c_obd", "c_obs", "kron_obd", "kron_obs", "obd", "obs", "taylor", "woodfisher", "hessian_trace"]


class Net(nn.Module):
    """A residual stream, a grouped convolution, and a flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(functional.relu(self.norm(self.a(x)), inplace=True))
        x = functional.max_pool2d(torch.relu_(self.mid(x)), 2)
        return self.head(x.flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    model.norm.running_var.copy_(randn(6, seed=9).square() + 0.5)
    return model


@pytest.fixture
def data():
    return [(randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 1, 0])), (randn(3, 2, 4, 4, seed=1), torch.tensor([2, 2, 0]))]


def images(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def graph_of(model):
    return trace(model, randn(1, 2, 4, 4))


def score(name, model, data, **options):
    return CRITERIA[name].score(graph_of(model), model, data, functional.cross_entropy, torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["producer", "consumer", "both"])
def test_every_prunable_group_is_scored_and_the_network_left_alone(net, data, name, side):
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    scores = score(name, net, data, **({} if name == "taylor" else {"side": side}))
    groups = {group.name: group.size for group in graph_of(net).groups if group.prunable}
    assert {key: len(value) for key, value in scores.items()} == groups and len(groups) >= 2
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    if name != "hessian_trace":
        assert all((value >= 0).all() and value.max() > 0 for value in scores.values())


def test_kron_scores_of_a_residual_stream_are_sums_over_its_layers(net, data):
    factors = collect(net, data, fisher="exact")
    stream = score("kron_obd", net, data, fisher="exact")["stem.weight"]
    assert len(stream) == 2  # the grouped convolution ties channels i and i + 2
    expected = torch.zeros(2, dtype=torch.float64)
    for name in ("stem", "b"):
        v = view(net.get_submodule(name), factors[name])
        for channel in range(2):
            change = torch.zeros_like(v.W[0])
            change[[channel, channel + 2]] = v.W[0][[channel, channel + 2]]
            expected[channel] += obs.joint_loss(change * 0, change, v.A[0], v.G[0])
    torch.testing.assert_close(stream, expected)


def test_a_row_score_is_the_kfac_loss_of_the_zeroed_row(net, data):
    entry = collect(net, data, fisher="exact")["a"]
    w = torch.cat([net.a.weight.detach().flatten(1), net.a.bias.detach()[:, None]], 1)
    H, indices = entry.block(), torch.arange(w.numel()).reshape(w.shape)
    plain, compensated = (
        score(name, net, data, fisher="exact", **options)["a.weight"]
        for name, options in (("kron_obd", {}), ("kron_obs", {"damping": 1e-12}))
    )
    for row in (0, 3):
        dw = torch.zeros_like(w)
        dw[row] = -w[row]
        torch.testing.assert_close(plain[row], dw.flatten() @ H @ dw.flatten() / 2)
        torch.testing.assert_close(
            compensated[row], constrained_minimum(w.flatten(), H + 1e-12 * torch.eye(len(H)), indices[row])[1], rtol=1e-4, atol=1e-9
        )


def test_consumer_scores_are_the_loss_of_columns_over_all_kernel_offsets(net, data):
    entry = collect(net, data, fisher="exact")["b"]
    w = torch.cat([net.b.weight.detach().flatten(1), net.b.bias.detach()[:, None]], 1)
    scores = score("kron_obd", net, data, fisher="exact", side="consumer")["a.weight"]
    for column in range(6):
        dw = torch.zeros_like(w)
        dw[:, column] = -w[:, column]
        torch.testing.assert_close(scores[column], dw.flatten() @ entry.block() @ dw.flatten() / 2)


def test_groups_and_flatten_follow_their_indices(net, data):
    factors = collect(net, data, fisher="exact")
    graph = graph_of(net)
    group = next(g for g in graph.groups if g.prunable and any(m.parameter == "mid.weight" and m.role == "out" for m in g.members))
    scores = score("kron_obd", net, data, fisher="exact", side="both")[group.name]
    mid, head = view(net.mid, factors["mid"]), view(net.head, factors["head"])
    expected = torch.zeros(group.size, dtype=torch.float64)
    for channel in range(group.size):
        for member in group.members:
            own = member.indices[channel].tolist()
            if member.parameter == "mid.weight" and member.role == "out":
                by_group = {j: [i % 2 for i in own if i // 2 == j] for j in (0, 1)}
                for j, rows in by_group.items():
                    if rows:
                        change = torch.zeros_like(mid.W[j])
                        change[rows] = -mid.W[j][rows]
                        expected[channel] += obs.joint_loss(change * 0, change, mid.A[j], mid.G[j])
            elif member.parameter == "head.weight":
                change = torch.zeros_like(head.W[0])
                change[:, own] = -head.W[0][:, own]
                expected[channel] += obs.joint_loss(change * 0, change, head.A[0], head.G[0])
    torch.testing.assert_close(scores, expected)


def test_c_obd_is_the_diagonal_of_the_exact_fisher(net, data):
    x, y = images(data)
    w = net.a.weight.detach().flatten(1)
    exact = ggn_block(net, "a", x).diagonal().reshape(6, 37)[:, :36]
    torch.testing.assert_close(score("c_obd", net, data, fisher="exact")["a.weight"], (w.square() * exact).sum(1) / 2)
    diagonal = empirical_block(net, "a", x, y).diagonal().reshape(6, 37)[:, :36]
    torch.testing.assert_close(score("c_obd", net, data, fisher="empirical")["a.weight"], (w.square() * diagonal).sum(1) / 2)


def test_c_obs_follows_its_formula(net, data):
    v = view(net.a, collect(net, data, fisher="exact")["a"])
    g, a = (torch.linalg.inv(m[0] + 1e-3 * m[0].diagonal().mean() * torch.eye(len(m[0]))).diagonal() for m in (v.G, v.A))
    expected = (v.W[0].square() / (g[:, None] * a)).sum(1) / 2
    torch.testing.assert_close(score("c_obs", net, data, fisher="exact", damping=1e-3)["a.weight"], expected)


@pytest.mark.parametrize("name", ["c_obd", "c_obs", "kron_obd", "kron_obs", "obd", "obs"])
def test_normalised_scores_are_the_losses_over_their_own_mean(net, data, name):
    losses, shares = score(name, net, data), score(name, net, data, normalize="mean")
    for group, values in losses.items():
        torch.testing.assert_close(shares[group], values / values.mean())


@pytest.mark.parametrize("name", ["obd", "obs"])
def test_table_rows_are_the_kron_criteria_with_the_datas_labels(net, data, name):
    ours = score(name, net, data)
    assert torch.equal(ours["a.weight"], score(f"kron_{name}", net, data, fisher="empirical")["a.weight"])


def test_taylor_is_the_normalised_absolute_first_order_term(net, data):
    kept = {}
    net.a.register_forward_hook(lambda _, __, out: kept.update(z=out))
    expected = 0
    for x, y in zip(*images(data), strict=True):
        loss = functional.cross_entropy(net(x[None]), y[None])
        expected = expected + (torch.autograd.grad(loss, kept["z"])[0] * kept["z"].detach()).abs().sum((0, 2, 3))
    net.a._forward_hooks.clear()
    torch.testing.assert_close(score("taylor", net, data)["a.weight"], expected / expected.sum())


def test_woodfisher_equals_the_recursion_on_the_whole_layer(net, data):
    x, y = images(data)
    rows = []
    for image, label in zip(x, y, strict=True):
        rows.append(torch.autograd.grad(functional.cross_entropy(net(image[None]), label[None]), net.b.weight)[0].flatten())
    X, w = torch.stack(rows), net.b.weight.detach().flatten().clone()
    inverse = woodfisher_inverse(X, 0.01 * X.square().mean())
    every = torch.arange(24).reshape(4, 6)
    for channel, columns in enumerate(every.T[:3]):
        exact = w[columns] @ torch.linalg.solve(inverse[columns[:, None], columns], w[columns]) / 2
        torch.testing.assert_close(score("woodfisher", net, data, block="layer", side="consumer", memory=1)["a.weight"][channel], exact)
    removed = every[:, [1, 4]].flatten()
    dw, _ = constrained_minimum(w, torch.linalg.inv(inverse), removed)
    CRITERIA["woodfisher"].compensate(graph_of(net), net, {"a.weight": [1, 4]}, data, block="layer")
    kept = every[:, [0, 2, 3, 5]].flatten()
    torch.testing.assert_close(net.b.weight.detach().flatten()[kept], (w + dw)[kept])
    torch.testing.assert_close(net.b.weight.detach().flatten()[removed], w[removed])


def test_hessian_trace_is_hutchinsons_estimate_with_the_exact_hessian(net, data):
    x, y = images(data)
    names = ["stem.weight", "b.weight", "a.weight", "mid.weight"]
    weights = {name: net.get_parameter(name).detach() for name in names}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = {name: part.reshape(weights[name].shape) for name, part in zip(names, flat.split(sizes), strict=True)}
        return functional.cross_entropy(torch.func.functional_call(net, parts, (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten() for weight in weights.values()]))
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([(torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).flatten() for weight in weights.values()]).double()
    start, stop = sum(sizes[:2]), sum(sizes[:3])
    traces = (signs * (hessian @ signs))[start:stop].reshape(6, 36).mean(1)
    ours = score("hessian_trace", net, [(x, y)], probes=1)["a.weight"]
    torch.testing.assert_close(ours, traces * weights["a.weight"].flatten(1).square().sum(1))


@pytest.mark.parametrize("where", ["consumer", "producer", "both"])
@pytest.mark.parametrize("name", ["kron_obs", "obs", "c_obs"])
def test_compensation_updates_the_layers_that_it_names(net, data, name, where):
    before = copy.deepcopy(net.state_dict())
    CRITERIA[name].compensate(graph_of(net), net, {"a.weight": [1, 4]}, data, compensation=where)
    changed = {key.partition(".")[0] for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"consumer": {"b"}, "producer": {"a"}, "both": {"a", "b"}}[where]
    assert torch.equal(net.b.weight[:, [1, 4]], before["b.weight"][:, [1, 4]])


@pytest.mark.parametrize("name", ["kron_obs", "obs", "c_obs"])
def test_compensation_lowers_the_loss_of_the_cut_on_the_calibration_data(net, data, name):
    x, _ = images(data)
    target = net(x).detach()
    graph, removal = graph_of(net), {"a.weight": [1, 4], "stem.weight": [0]}
    plain, compensated = copy.deepcopy(net), copy.deepcopy(net)
    graph.prune(plain, removal)
    CRITERIA[name].compensate(graph, compensated, removal, data, torch.Generator().manual_seed(0))
    graph.prune(compensated, removal)
    distance = [
        functional.kl_div(m(x).log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True).item()
        for m in (plain, compensated)
    ]
    assert distance[1] < distance[0]


def test_compensation_at_the_consumer_is_least_squares_on_its_real_inputs(net, data):
    x, _ = images(data)
    inputs = []
    handle = net.b.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().movedim(1, -1).flatten(0, 2)))
    net(x)
    handle.remove()
    features = torch.cat([inputs[0], torch.ones(len(inputs[0]), 1)], 1)
    wanted = features @ torch.cat([net.b.weight.detach().flatten(1), net.b.bias.detach()[:, None]], 1).T
    kept = torch.tensor([0, 2, 3, 5, 6])
    best = torch.linalg.lstsq(features[:, kept], wanted).solution.T
    CRITERIA["kron_obs"].compensate(graph_of(net), net, {"a.weight": [1, 4]}, data, torch.Generator().manual_seed(0), damping=1e-12)
    torch.testing.assert_close(net.b.weight.detach().flatten(1)[:, kept[:-1]], best[:, :-1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(net.b.bias.detach(), best[:, -1], rtol=1e-5, atol=1e-7)


def test_a_linearly_dependent_channel_is_removed_without_loss(net, data):
    with torch.no_grad():  # channel 5 of the block becomes a copy of channel 2 times 1.5, behind its normalisation
        for tensor in (net.norm.running_mean, net.norm.running_var):
            tensor[5] = tensor[2]
        for tensor in (net.a.weight, net.a.bias):
            tensor[5] = tensor[2]
        net.norm.weight[5], net.norm.bias[5] = 1.5 * net.norm.weight[2], 1.5 * net.norm.bias[2]
    x, _ = images(data)
    expected = net(x).detach()
    graph = graph_of(net)
    scores = score("kron_obs", net, data, side="consumer", damping=1e-10)["a.weight"]
    assert scores[[2, 5]].max() < 1e-3 * scores[[0, 1, 3, 4]].min()
    CRITERIA["kron_obs"].compensate(graph, net, {"a.weight": [5]}, data, damping=1e-10)
    graph.prune(net, {"a.weight": [5]})
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_nothing_removed_changes_nothing_and_obd_does_not_compensate(net, data):
    before = copy.deepcopy(net.state_dict())
    CRITERIA["kron_obs"].compensate(graph_of(net), net, {"a.weight": []}, data)
    CRITERIA["kron_obd"].compensate(graph_of(net), net, {"a.weight": [1]}, data)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options, given, words", [({"sides": 1}, True, "no option 'sides'"), ({}, False, "calibration")])
def test_bad_input_is_one_sentence(net, data, name, options, given, words):
    with pytest.raises(UserError) as error:
        score(name, net, data if given else None, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_one_sentence_and_one_image_a_result(net, data, name):
    with pytest.raises(UserError, match="image"):
        score(name, net, [])
    one = score(name, net, [(data[0][0][:1], data[0][1][:1])])
    assert all(torch.isfinite(value).all() for value in one.values())
