"""Oracle: the divergence of a network with one layer replaced, computed here; power laws; networks in which one layer does not matter."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from compress import compress
from compress.allocate.outputs import Outputs
from compress.cost import count
from compress.decompose import factorize
from compress.errors import RunError, UserError
from compress.graph import trace
from compress.methods import Context, method, needs_data
from compress.methods.measured_menus import SHARES, probes, rescale

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X[:32], torch.arange(32) % 4), (X[32:], torch.arange(16) % 4)]


def network():
    """Three convolutions, of which the last hardly reaches the outputs."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[5].weight.mul_(1e-3)
        model[5].weight += torch.eye(12)[:, :, None, None] * functional.pad(torch.ones(1, 1), (1, 1, 1, 1))
        model[8].weight.mul_(20)
    return model.eval()


def context(model, **settings):
    return Context(model, trace(model, X[:1]), X[:1], BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0), **settings)


def divergence(model, changed):
    """KL per image, float64, BatchNorm by the batch."""
    total = 0.0
    for x, _ in BATCHES:
        p, q = (copy.deepcopy(net).train()(x).double().log_softmax(1) for net in (model, changed))
        total += (p.exp() * (p - q)).sum().item()
    return total / len(X)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 4.0), st.floats(1e-3, 1e3))
def test_a_power_law_between_estimate_and_loss_is_recovered(exponent, scale):
    estimates = [0.01, 0.03, 0.1, 0.5, 1.0]
    found = rescale(estimates, [(e, scale * e**exponent) for e in (0.01, 0.1, 1.0)])
    assert found == pytest.approx([scale * e**exponent for e in estimates], rel=1e-9, abs=1.1e-7)


def test_small_estimates_and_losses_within_the_rounding_keep_the_order_of_the_ranks():
    found = rescale([1e-15, 1e-14, 1e-13, 1e-12, 1e-11], [(1e-15, 1e-3), (1e-14, 0.01), (1e-12, 1.0)])
    assert found == pytest.approx([1e-3, 1e-2, 0.1, 1.0, 10.0], rel=1e-3)
    found = rescale([0.01, 0.1, 0.5, 1.0], [(0.01, -1e-9), (0.5, 1e-8), (1.0, -2e-9)])
    assert sorted(found) == found and len(set(found)) == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e6)), min_size=1, max_size=5), st.lists(st.floats(0, 20), min_size=2, max_size=9))
def test_losses_never_fall_as_the_estimate_rises(points, estimates):
    found = rescale(sorted(estimates), points)
    assert all(math.isfinite(value) and value >= 0 for value in found)
    assert all(a <= b * (1 + 1e-9) for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("name", ["svd", "tucker", "cp", "kfac_cp"])
def test_measured_points_are_the_divergence_of_the_network_with_one_layer_replaced(name):
    model = network()
    before = copy.deepcopy(model.state_dict())
    chosen, given_ = method(name), context(model)
    state = chosen.prepare(given_)
    menus = chosen.measured(given_, state)
    assert chosen.measured(given_, state) is menus and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for menu, estimated in zip(menus, state.estimated, strict=True):
        assert menu.costs == estimated.costs and menu.ranks == estimated.ranks and menu.losses[0] == 0
        assert len(probes(estimated)) <= len(SHARES)
        highest = 0.0  # losses never fall as the estimate rises
        for option in sorted(probes(estimated), key=lambda option: estimated.losses[option]):
            cut = copy.deepcopy(model)
            cut.set_submodule(menu.name, chosen._block(given_, menu.name, menu.ranks[option], state))
            highest = max(highest, divergence(model, cut))
            assert menu.losses[option] == pytest.approx(highest, rel=1e-3, abs=1e-6)


def test_the_layer_that_does_not_matter_is_cut_first():
    """The last convolution is nearly the identity: in the Frobenius norm no layer is harder to approximate, in the outputs none easier than at rank 12."""
    model = network()
    with torch.no_grad():
        model[8].weight[:, 1:] = 0  # only the first of its twelve channels is read
    shares = {}
    for allocation in ("global", "measured"):
        small, _, report = compress(model, X[:1], BATCHES, method="svd", budget={"macs": 0.45}, allocation=allocation, recalibrate=False)
        outputs = [net(X).log_softmax(1) for net in (model, small)]
        shares[allocation] = functional.kl_div(outputs[1], outputs[0], log_target=True, reduction="batchmean").item()
        assert count(small, X[:1]).macs <= 0.56 * count(model, X[:1]).macs
    assert shares["measured"] < 0.5 * shares["global"]


def test_what_it_needs():
    assert needs_data("svd", "measured") and not needs_data("svd", "global") and method("kfac_cp").allocations == ("global", "uniform", "measured")
    with pytest.raises(UserError, match="Allocation 'measured' needs calibration data"):
        compress(network(), X[:1], method="svd", allocation="measured")
    with pytest.raises(UserError, match="has no option 'iteration'"):
        compress(network(), X[:1], BATCHES, method="kfac_cp", options={"iteration": 3})


class Reads(nn.Module):
    """A network that reads the weight of one of its layers itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.a.weight.mean()


def test_a_layer_that_cannot_be_replaced_and_images_that_say_nothing_are_named():
    x = torch.randn(16, 8)
    batches = [(x, torch.arange(16) % 4)]
    with pytest.raises(RunError, match="With layer 'a' replaced .* exclude the layer"):
        compress(Reads().eval(), x[:1], batches, method="svd", budget={"macs": 0.3}, allocation="measured")
    small, _, _ = compress(Reads().eval(), x[:1], batches, method="svd", budget={"macs": 0.1}, allocation="measured", exclude=["a"])
    assert torch.isfinite(small(x)).all()
    x[3] = float("nan")
    for name in ("svd", "l1"):
        with pytest.raises(RunError, match="NaN or infinity on the calibration images"):
            compress(Reads().eval() if name == "svd" else nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), x[:1], batches, method=name,
                     budget={"macs": 0.3}, allocation="measured")


def test_an_option_of_the_method_reaches_the_decomposition():
    model, results = network(), {}
    for iterations in (0, 50):
        chosen, given_ = method("kfac_cp"), context(model, options={"iterations": iterations})
        state = chosen.prepare(given_)
        entry = state.moments["3"]
        block = chosen._block(given_, "3", (5,), state)
        expected = factorize(model[3], "kfac_cp", 5, A=entry.A, G=entry.G, iterations=iterations)
        results[iterations] = block(torch.ones(1, 12, 8, 8))
        torch.testing.assert_close(results[iterations], expected(torch.ones(1, 12, 8, 8)))
    assert not torch.allclose(results[0], results[50])


def test_a_destroyed_network_is_dear_and_outputs_of_the_same_network_are_no_apart():
    model = network()
    reference = Outputs(model, BATCHES)
    assert reference.divergence(model) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        broken = copy.deepcopy(model)
        broken[8].bias[0] = float("nan")
    assert not math.isfinite(reference.divergence(broken))
