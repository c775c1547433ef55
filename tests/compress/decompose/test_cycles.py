"""Oracle: moving averages and gradients by autograd, one image and one class at a time, and counts of the materialised network."""

import copy

import pytest
import torch

from compress.decompose.eigen import rotate
from compress.decompose.improved import CycleState, ImprovedOptions, cut, cycle_scores, grow
from compress.decompose.rounds import select
from compress.errors import UserError
from tests.compress.decompose.nets import batches, network

FIRST, SECOND = batches()
PLAIN = ImprovedOptions(fisher="exact", eigenvalues="products")


def params(net):
    return sum(parameter.numel() for parameter in net.parameters())


def hidden_moments(net, batch, training=False):
    """(A, G) of the layer `hidden` over one batch: inputs, and gradients of all classes weighted by their probabilities."""
    net = copy.deepcopy(net).train(training)
    seen = {}
    net.hidden.register_forward_hook(lambda module, inputs, output: seen.update(a=inputs[0].detach(), z=output))
    logs = torch.log_softmax(net(batch[0]), 1)
    A = seen["a"].T @ seen["a"] / len(batch[0])
    G = torch.zeros(12, 12, dtype=torch.float64)
    for image in range(len(logs)):
        for label in range(4):
            (gradient,) = torch.autograd.grad(-logs[image, label], seen["z"], retain_graph=True)
            G += logs[image, label].exp().detach() * torch.outer(gradient[image], gradient[image]) / len(logs)
    return A, G


def hidden_second(net, batch, q_a, q_g):
    """Second moments of the rotated weight gradients of `hidden`, image by image and class by class."""
    total = torch.zeros(12, 16, dtype=torch.float64)
    for image in range(len(batch[0])):
        log = torch.log_softmax(net(batch[0][image:image + 1]), 1)[0]
        for label in range(4):
            (gradient,) = torch.autograd.grad(-log[label], net.hidden.weight, retain_graph=True)
            total += log[label].exp().detach() * (q_g.T @ gradient @ q_a).square() / len(batch[0])
    return total


def dense(spectrum):
    return spectrum.vectors @ torch.diag(spectrum.values) @ spectrum.vectors.T


def test_the_moving_average_weighs_two_batches_as_by_hand():
    net = network()
    (A1, G1), (A2, G2) = hidden_moments(net, FIRST), hidden_moments(net, SECOND)
    entry = cycle_scores(net, [FIRST, SECOND], PLAIN.model_copy(update={"moving_average": 0.9}))["hidden"]
    # the weights 0.9 and 1 of the first and the second batch add up to one
    torch.testing.assert_close(dense(entry.spectra[0]), (0.9 * A1 + A2) / 1.9)
    torch.testing.assert_close(dense(entry.spectra[1]), (0.9 * G1 + G2) / 1.9)
    plain = cycle_scores(net, [FIRST, SECOND], PLAIN)["hidden"]
    torch.testing.assert_close(dense(plain.spectra[0]), (A1 + A2) / 2)


def test_training_mode_takes_the_statistics_of_the_batch():
    net = network()
    A, G = hidden_moments(net, FIRST, training=True)
    entry = cycle_scores(net, [FIRST], PLAIN.model_copy(update={"training_mode": True}))["hidden"]
    torch.testing.assert_close(dense(entry.spectra[0]), A)
    torch.testing.assert_close(dense(entry.spectra[1]), G)
    assert not torch.allclose(A, hidden_moments(net, FIRST)[0])


@pytest.mark.parametrize("eigenvalues", ["first_batch", "all"])
def test_corrected_eigenvalues_come_from_the_batches_that_the_option_names(eigenvalues):
    net = network()
    entry = cycle_scores(net, [FIRST, SECOND], PLAIN.model_copy(update={"eigenvalues": eigenvalues}))["hidden"]
    q_a, q_g = (spectrum.vectors for spectrum in entry.spectra)
    second = hidden_second(net, FIRST, q_a, q_g)
    if eigenvalues == "all":
        second = (second + hidden_second(net, SECOND, q_a, q_g)) / 2
    theta = rotate(net.hidden.weight.detach(), q_a, q_g).square() * second
    torch.testing.assert_close(entry.sides.rows, theta.sum(1))
    torch.testing.assert_close(entry.sides.columns, theta.sum(0))


@pytest.mark.parametrize("needed", [200, 500, 1500, 2100])
def test_a_budget_is_met_on_the_network_although_layers_may_grow(needed):
    net, state = network(), CycleState()
    before = params(net)
    cut(net, batches(), ImprovedOptions(fisher="exact", allow_increase=True), state, needed=(needed, 0))
    assert before - params(net) == state.saved[0] >= needed


def test_allowed_increase_replaces_exactly_the_layers_that_were_cut():
    net, options = network(), ImprovedOptions(fisher="exact", allow_increase=True, pool_fraction=0.05)
    entries = cycle_scores(net, batches(), options)
    kept = select(entries, options)
    cutted = [name for name, sides in kept.items() if (len(sides.rows), len(sides.columns)) != tuple(entries[name].weight.shape[:2])]
    strict = network()
    assert len(cut(strict, batches(), options.model_copy(update={"allow_increase": False}), CycleState())) < len(cutted)
    before, state = params(net), CycleState()
    assert cut(net, batches(), options, state) == cutted
    assert before - params(net) == state.saved[0]


def test_allowed_increase_freezes_what_the_options_freeze():
    net = network()
    cut(net, batches(), ImprovedOptions(fisher="exact", allow_increase=True, fix_rotation=True, pool_fraction=0.4), CycleState())
    assert not net.b.input.weight.requires_grad and not net.b.output.weight.requires_grad and net.b.core.weight.requires_grad


def test_increase_switches_itself_on_after_a_cycle_that_removed_too_little():
    options = ImprovedOptions(fisher="exact", allow_increase="auto", pool_fraction=0.02)
    net, state = network(), CycleState()
    assert cut(net, batches(), options, state) == [] and state.stalled
    assert cut(net, batches(), options, state) != []
    much = CycleState()
    cut(network(), batches(), options.model_copy(update={"pool_fraction": 0.4}), much)
    assert not much.stalled
    met = CycleState()
    cut(network(), batches(), options, met, needed=(0, 0))
    assert not met.stalled


@pytest.mark.parametrize("decomposition", ["svd", "cp"])
def test_growth_is_refused_only_where_something_should_grow(decomposition):
    net, state = network(), CycleState()
    options = ImprovedOptions(fisher="exact", decomposition=decomposition, back_ratio=0.0, pool_fraction=0.4)
    assert cut(net, batches(), options, state)
    before = params(net)
    assert grow(net, options, state) == 0 and params(net) == before
    with pytest.raises(UserError, match="cannot grow"):
        grow(net, options.model_copy(update={"back_ratio": 0.1}), state)


@pytest.mark.parametrize("back_ratio", [0.1, 0.25, 0.5])
def test_growth_draws_the_back_ratio_of_what_was_removed(back_ratio):
    net, state = network(), CycleState()
    options = ImprovedOptions(fisher="exact", back_ratio=back_ratio, pool_fraction=0.6)
    cut(net, batches(), options, state)
    removed = sum(map(sum, state.removed.values()))
    # one side holds all shares and has room for all draws
    name = max(state.removed, key=lambda name: state.removed[name][1])
    state.shares, wanted = {name: (0.0, 1.0)}, int(back_ratio * removed)
    assert grow(net, options, state) == min(wanted, state.removed[name][1])
