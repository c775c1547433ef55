"""Oracle: networks whose loss per channel is known in closed form, exhaustive search, and laws of a loss curve."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress import compress
from compress.allocate import allocate
from compress.allocate.curves import marginals, measure
from compress.errors import UserError
from compress.graph import trace
from compress.methods import method, needs_data

from .test_allocate import Chain, random_scores


@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(1.0, 5.0), scale=st.floats(1e-3, 1e3), size=st.integers(8, 96))
def test_a_power_law_is_recovered_at_every_width(exponent, scale, size):
    points = [(0, 0.0), *((n, scale * (n / size) ** exponent) for n in sorted({max(1, size // 8), size // 4, size // 2, 3 * size // 4}))]
    first = points[1][0]
    found = marginals(points, size).cumsum(0)
    expected = scale * (torch.arange(1, size + 1, dtype=torch.float64) / size) ** exponent
    torch.testing.assert_close(found[first - 1:], expected[first - 1:], rtol=1e-6, atol=1e-9 * scale)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1e3), min_size=1, max_size=4), st.integers(5, 40))
def test_marginals_are_ascending_and_never_negative(losses, size):
    found = marginals([(0, 0.0), *((n + 1, loss) for n, loss in enumerate(losses))], size)
    assert found.shape == (size,) and bool((found >= 0).all()) and bool((found.diff() >= 0).all()) and bool(torch.isfinite(found).all())


def test_a_destroyed_network_is_dear_and_not_an_error():
    found = marginals([(0, 0.0), (2, 0.1), (4, float("nan"))], 8)
    assert torch.isfinite(found).all() and found[2:4].sum() > 1e5 and found[:2].sum() == pytest.approx(0.1)


@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_the_cheapest_widths_of_an_exhaustive_search(quantity):
    """Two groups apart from each other (the pinned layer between them), so that costs are separable and losses convex: the walk is optimal."""
    graph = Chain([3, 12, 5, 10, 4], areas=[64, 64, 16, 16])
    graph.groups[2].prunable, graph.groups[2].reason = False, "pinned"
    scores = random_scores(graph)
    losses = {"g1": torch.arange(1, 13, dtype=torch.float64) ** 2, "g3": 3.0 * torch.arange(1, 11, dtype=torch.float64)}
    removed = allocate(graph, scores, {quantity: 0.4}, kind="measured", losses=losses)
    index = ("params", "macs").index(quantity)
    total = graph.count({})[index]

    def outcome(a, b):
        keep = {"g1": torch.arange(12 - a), "g3": torch.arange(10 - b)}
        return 1 - graph.count(keep)[index] / total, float(losses["g1"][:a].sum() + losses["g3"][:b].sum())

    a, b = (len(removed.get(name, ())) for name in ("g1", "g3"))
    gone, loss = outcome(a, b)
    least = min(other for other_gone, other in itertools.starmap(outcome, itertools.product(range(12), range(10))) if other_gone >= gone)
    assert gone == pytest.approx(0.4, abs=0.02) and loss == pytest.approx(least)


def _network():
    """Two hidden layers of the same size; the channels of the second are copies of each other, so that they cost nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        model[3].weight.copy_(model[3].weight[:1].expand_as(model[3].weight))
        model[3].bias.zero_()
        model[8].weight.zero_()
        model[8].weight[:, 7] = torch.randn(5) * 3
    return model.eval()


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, 5, (n,), generator=generator)) for n in (16, 16, 8)]


def test_the_divergence_of_one_cut_is_the_definition():
    model, batches = _network(), _batches()
    graph = trace(model, batches[0][0][:1])
    scores = {group.name: torch.arange(float(group.size)) for group in graph.groups if group.prunable}
    before = copy.deepcopy(model.state_dict())

    def cut(removed):
        trial = copy.deepcopy(model)
        graph.prune(trial, removed, verify=False)
        return trial

    found = measure(graph, model, scores, batches, cut, images=20, fractions=(0.5,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not any(m.training for m in model.modules())
    name = next(iter(scores))
    images = torch.cat([x for x, _ in batches])[:20]
    total = 0.0
    for part in (images[:16], images[16:]):
        p, q = (copy.deepcopy(network).train()(part).double().softmax(1) for network in (model, cut({name: range(4)})))
        total += float((p * (p.log() - q.log())).sum().detach())
    assert float(found[name][:4].sum()) == pytest.approx(total / 20, rel=1e-4)


@pytest.mark.parametrize("name", ["l1", "kron_obs"])
def test_channels_that_carry_nothing_go_first(name):
    model, batches = _network(), _batches()
    options = {"fisher": "empirical"} if name == "kron_obs" else {}
    small, _, report = compress(model, batches[0][0][:1], batches, method=name, budget={"macs": 0.4}, allocation="measured", options=options)
    equal = compress(model, batches[0][0][:1], batches, method=name, budget={"macs": 0.4}, allocation="uniform", options=options)[0]
    assert small[3].out_channels <= 4 < 7 <= small[0].out_channels
    assert 5 <= equal[0].out_channels <= 6 and 5 <= equal[3].out_channels <= 7
    assert report.macs_removed == pytest.approx(0.4, abs=0.05)
    assert model[0].out_channels == 8


def test_what_it_needs_and_who_has_it():
    model, x = _network(), torch.randn(1, 3, 6, 6)
    assert needs_data("l1", "measured") and not needs_data("l1", "global")
    with pytest.raises(UserError, match="Allocation 'measured' needs calibration data"):
        compress(model, x, method="l1", allocation="measured")
    with pytest.raises(UserError, match="'eigendamage' shares its budget by one of global"):
        compress(model, x, _batches(), method="eigendamage", allocation="measured")
    with pytest.raises(UserError, match="measured loss of every channel group"):
        allocate(trace(model, x), {"0.weight": torch.arange(8.0)}, {"macs": 0.2}, kind="measured")
    with pytest.raises(UserError, match="compares class logits"):
        compress(nn.Sequential(*model[:8], nn.Linear(8, 5), nn.Flatten(0)), x, _batches(), method="l1", allocation="measured")
    assert method("l1").allocations == ("global", "uniform", "measured")
