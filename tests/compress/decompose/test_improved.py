"""Oracle: the unweighted Tucker-2 of the weight, exact Fisher blocks, saliency shares summed by hand, and the network's own outputs."""

import copy

import pytest
import torch

from compress.curvature import collect
from compress.curvature.linalg import Spectrum
from compress.curvature.quadratic import channel_moment, nearest_kronecker, spatial_moment
from compress.decompose import recompose, tucker2
from compress.decompose.improved import CycleState, ImprovedOptions, cut, cycle_proposal, cycle_scores, grow, tikhonov
from compress.decompose.modules import dense_weight
from compress.decompose.rounds import select
from compress.decompose.selection import Sides
from compress.errors import UserError
from tests.compress.decompose.nets import batches, network
from tests.oracles.curvature import ggn_block

X = torch.cat([x for x, _ in batches()])
CUT = ImprovedOptions(fisher="exact", pool_fraction=0.4)


def test_tucker_ranks_come_from_the_pool_and_subspaces_from_the_plain_weight():
    net = network()
    entries = cycle_scores(net, batches(), CUT)
    kept = select(entries, CUT)
    weight, sides = net.b.weight.detach().clone(), kept["b"]
    assert "b" in cut(net, batches(), CUT, CycleState())
    assert net.b.core.weight.shape[:2] == (len(sides.rows), len(sides.columns))
    torch.testing.assert_close(dense_weight(net.b), recompose(tucker2(weight, (len(sides.rows), len(sides.columns)))))


def test_last_layer_is_a_target_and_a_second_cycle_merges():
    net, state = network(), CycleState()
    assert "head" in cycle_scores(net, batches(), CUT)
    cut(net, batches(), CUT, state)
    widths, before = (net.b.core.weight.shape[:2]), dense_weight(net.b)
    entry = cycle_scores(net, batches(), CUT)["b"]
    everything = Sides(*(torch.arange(n) for n in entry.weight.shape[:2]))
    torch.testing.assert_close(recompose(cycle_proposal(entry, everything, CUT)), before)
    cut(net, batches(), CUT, state)
    assert net.b.core.weight.numel() < widths.numel() * 9 and len(list(net.b.children())) == 3


def test_three_factor_importances_without_correction_add_up_to_the_kronecker_loss():
    net = network(width=3)
    options = CUT.model_copy(update={"spatial": "partial_trace", "eigenvalues": "products"})
    entry = cycle_scores(net, batches(), options)["b"]
    factors = collect(net, batches(), fisher="exact", bias=False)["b"]
    C, K = channel_moment(factors.A, net.b.weight), spatial_moment(factors.A, net.b.weight)
    w = net.b.weight.detach().flatten(1)
    assert entry.sides.rows.sum().item() == pytest.approx((w @ torch.kron(C, K) * (factors.G @ w)).sum().item(), rel=1e-9)
    nearest = cycle_scores(net, batches(), options.model_copy(update={"spatial": "nearest"}))["b"]
    C, K = nearest_kronecker(factors.A, net.b.weight)
    assert nearest.sides.rows.sum().item() == pytest.approx((w @ torch.kron(C, K) * (factors.G @ w)).sum().item(), rel=1e-9)


def test_corrected_three_factor_importances_use_the_diagonal_of_the_exact_block():
    net = network(width=3)
    options = CUT.model_copy(update={"spatial": "partial_trace"})
    entry = cycle_scores(net, batches(), options)["b"]
    factors = collect(net, batches(), fisher="exact", bias=False)["b"]
    C, K = channel_moment(factors.A, net.b.weight), spatial_moment(factors.A, net.b.weight)
    (q_c, q_k, q_g) = (torch.linalg.eigh(m)[1].contiguous() for m in (C, K, factors.G))
    order = torch.arange(6 * 55).reshape(6, 55)[:, :54].flatten()
    exact = ggn_block(net, "b", X)[order][:, order]
    basis = torch.kron(q_g, torch.kron(q_c, q_k))
    theta = (basis.T @ net.b.weight.detach().flatten()).square() * (basis.T @ exact @ basis).diagonal()
    torch.testing.assert_close(entry.sides.rows, theta.reshape(6, -1).sum(1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(entry.sides.columns, theta.reshape(6, 6, 9).sum((0, 2)), rtol=1e-6, atol=1e-12)


def test_shares_are_the_removed_saliency_and_average_over_cycles():
    net, state = network(), CycleState()
    entries = cycle_scores(net, batches(), CUT)
    kept = select(entries, CUT)
    changed = cut(net, batches(), CUT, state)
    lost = {
        name: [(side.sum() - side[index].sum()).item() for side, index in zip(entries[name].sides, kept[name], strict=True)]
        for name in changed
    }
    total = sum(map(sum, lost.values()))
    for name in changed:
        assert state.shares[name] == pytest.approx([value / total / 2 for value in lost[name]], rel=1e-9)
        assert state.removed[name] == tuple(entries[name].weight.shape[i] - len(kept[name][i]) for i in (0, 1))
    first = dict(state.shares)
    second = cut(net, batches(), CUT, state)
    assert set(state.shares) == set(second)
    assert all(sum(state.shares[name]) > 0.5 * sum(first.get(name, (0, 0))) - 1e-12 for name in second)


@pytest.mark.parametrize("growth", ["preserving", "copy"])
def test_growth_adds_what_it_says_and_keeps_the_function_unless_it_copies(growth):
    net, state = network(), CycleState()
    options = CUT.model_copy(update={"growth": growth, "back_ratio": 0.5})
    cut(net, batches(), options, state)
    widths = {name: sum(net.get_submodule(name).core.weight.shape[:2]) for name in state.shares}
    before, parameters = net(X), sum(p.numel() for p in net.parameters())
    added = grow(net, options, state, torch.Generator().manual_seed(0))
    assert 0 < added <= int(0.5 * sum(map(sum, state.removed.values())))
    assert sum(sum(net.get_submodule(name).core.weight.shape[:2]) for name in widths) == sum(widths.values()) + added
    assert sum(p.numel() for p in net.parameters()) > parameters
    same = torch.allclose(net(X), before, atol=1e-10)
    assert same == (growth == "preserving")
    if growth == "preserving":  # the new parameters are not stuck: gradients reach the zero side
        net(X).square().sum().backward()
        for name in widths:
            block = net.get_submodule(name)
            assert all((p.grad.flatten(1).norm(dim=1) > 0).any() for p in (block.core.weight, block.output.weight))


def test_growth_stops_at_the_layers_own_width():
    net, state = network(), CycleState()
    cut(net, batches(), CUT, state)
    name = next(iter(state.shares))
    state.shares, state.removed = {name: (1.0, 0.0)}, {name: (10**4, 0)}
    block = net.get_submodule(name)
    room = block.output.out_channels - block.core.out_channels
    assert grow(net, CUT, state) == room and net.get_submodule(name).core.out_channels == block.output.out_channels


def test_published_options_run_a_cycle_and_leave_the_buffers():
    net, state = network(), CycleState()
    net.train()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    options = ImprovedOptions.published(pool_fraction=0.4)
    assert (options.moving_average, options.eigenvalues, options.training_mode, options.growth, options.cap) == (
        0.9,
        "first_batch",
        True,
        "copy",
        0.5,
    )
    assert cut(net, batches(), options, state, torch.Generator().manual_seed(0))
    grow(net, options, state, torch.Generator().manual_seed(0))
    assert net.training and all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert torch.isfinite(net(X)).all()


@pytest.mark.parametrize("decomposition, form", [("usual", "three"), ("cp", "depthwise"), ("svd", "output")])
def test_other_decompositions_replace_the_layers_at_predicted_cost(decomposition, form):
    from compress.cost import count
    from compress.decompose.rounds import accepted

    net, options = network(), CUT.model_copy(update={"decomposition": decomposition})
    assert options.form == form
    entries = cycle_scores(net, batches(), options)
    savings = accepted(entries, select(entries, options), options)
    cutted = copy.deepcopy(net)
    assert cut(cutted, batches(), options, CycleState()) == list(savings) != []
    before, after = (count(model.float(), X[:1].float()) for model in (net, cutted))
    assert (before.params - after.params, before.macs - after.macs) == tuple(map(sum, zip(*savings.values(), strict=True)))
    if decomposition != "usual":
        with pytest.raises(UserError, match="cannot grow"):
            grow(cutted, options, CycleState())


def test_a_budget_and_allowed_increase():
    net = network()
    parameters = sum(p.numel() for p in net.parameters())
    cut(net, batches(), CUT, CycleState(), needed=(1500, 0))
    assert parameters - sum(p.numel() for p in net.parameters()) >= 1500
    bigger = network()
    assert set(cut(bigger, batches(), CUT.model_copy(update={"allow_increase": True, "pool_fraction": 0.05}), CycleState()))


def test_tikhonov_follows_its_formula():
    A, G, K = (Spectrum(torch.eye(2), torch.tensor(v)) for v in ([2.0, 6.0], [0.5, 1.5], [3.0, 1.0]))
    a, g = tikhonov(A, G, 1e-2)
    pi = (4.0 / 1.0) ** 0.5
    assert (a.values - A.values)[0].item() == pytest.approx((1e-2 * pi) ** 0.5, rel=1e-5)
    assert (g.values - G.values)[0].item() == pytest.approx((1e-2 / pi) ** 0.5, rel=1e-5)
    three = tikhonov(A, G, 1e-3, K)
    assert (three[0].values - A.values)[0].item() == pytest.approx(0.1 * (16 / (1 * 2)) ** (1 / 3), rel=1e-5)
