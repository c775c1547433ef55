"""Oracle: exact generalised Gauss-Newton blocks by one Jacobian per image (tests/oracles/curvature.py)."""

import pytest
import torch
from torch import nn

from compress.curvature import collect
from tests.compress.curvature.nets import convnet, mlp, randn
from tests.oracles.curvature import empirical_block, ggn_block


def near(actual, expected, tolerance=1e-10):
    return (actual - expected).norm() <= tolerance * expected.norm()


def test_kfac_of_a_deep_linear_net_with_mse_is_the_exact_block():
    net = mlp(activation=nn.Identity)
    x = randn(7, 4)
    for name, entry in collect(net, [x], fisher="exact", loss="mse").items():
        assert near(entry.block(), ggn_block(net, name, x, "mse"))


def test_kfac_of_one_image_is_the_exact_block():
    net, x = mlp(), randn(1, 4)
    for name, entry in collect(net, [x], fisher="exact").items():
        assert near(entry.block(), ggn_block(net, name, x))


def test_expand_is_exact_for_shared_weights_without_pooling():
    net, x = mlp(activation=nn.Identity), randn(3, 5, 4)
    for name, entry in collect(net, [x], fisher="exact", loss="mse").items():
        assert entry.positions == 5
        assert near(entry.block(), ggn_block(net, name, x, "mse"))


def test_reduce_is_exact_for_a_convolution_with_average_pooling():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = randn(5, 2, 5, 4)
    factors = collect(net, [x], fisher="exact", loss="mse", sharing="reduce")
    assert near(factors["1"].block(), ggn_block(net, "1", x, "mse"))
    expanded = collect(net, [x], fisher="exact", loss="mse")["1"].block()
    assert (expanded - factors["1"].block()).norm() > 0.01 * expanded.norm()


def test_empirical_blocks_of_one_image_and_of_ekfac_traces():
    net, x, y = mlp(), randn(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])
    for name, entry in collect(net, [(x[:1], y[:1])], fisher="empirical").items():
        assert near(entry.block(), empirical_block(net, name, x[:1], y[:1]))
    for name, entry in collect(net, [(x[:4], y[:4]), (x[4:], y[4:])], fisher="empirical", ekfac=True).items():
        assert near(entry.second.sum(), empirical_block(net, name, x, y).trace())


def test_every_layer_kind_has_the_exact_trace_and_diagonal_after_correction():
    net, x = convnet(), randn(5, 2, 7, 8)
    net.eval()
    factors = collect(net, [x[:3], x[3:]], fisher="exact", ekfac=True)
    for name in ("0", "5", "9"):
        exact, entry = ggn_block(net, name, x), factors[name]
        assert near(entry.second.sum(), exact.trace())
        q_a, q_g = (spectrum.vectors for spectrum in entry.eigen())
        basis = torch.kron(q_g, q_a)
        assert near(entry.second.flatten(), (basis.T @ exact @ basis).diagonal())


def test_groups_are_treated_per_group():
    net, x = convnet(), randn(4, 2, 7, 8)
    net.eval()
    entry = collect(net, [x], fisher="exact", ekfac=True)["3"]
    exact = ggn_block(net, "3", x)
    assert entry.A.shape == (2, 13, 13) and entry.G.shape == (2, 3, 3) and entry.second.shape == (2, 3, 13)
    spectrum_a, spectrum_g = entry.eigen()
    for g in range(2):
        basis = torch.kron(spectrum_g.vectors[g], spectrum_a.vectors[g])
        block = exact[g * 39:(g + 1) * 39, g * 39:(g + 1) * 39]
        assert near(entry.second[g].flatten(), (basis.T @ block @ basis).diagonal())


@pytest.mark.parametrize("seed", range(50))
def test_ekfac_has_the_exact_trace_and_is_never_farther_than_kfac(seed):
    net, x = mlp(seed, (3, 4, 3)), randn(6, 3, seed=seed)
    for name, entry in collect(net, [x], fisher="exact", ekfac=True).items():
        exact = ggn_block(net, name, x)
        assert entry.second.sum().item() == pytest.approx(exact.trace().item(), rel=1e-10)
        assert (entry.block(corrected=True) - exact).norm() <= (entry.block() - exact).norm() * (1 + 1e-12)


def test_ekfac_with_the_products_of_the_eigenvalues_is_kfac():
    for entry in collect(mlp(), [randn(6, 4)], fisher="exact").values():
        spectrum_a, spectrum_g = entry.eigen()
        entry.second = spectrum_g.values[:, None] * spectrum_a.values
        assert near(entry.block(corrected=True), entry.block())


def test_the_scale_of_a_layer_is_its_true_trace_over_the_kfac_trace():
    net, x = convnet(), randn(5, 2, 7, 8)
    net.eval()
    entry = collect(net, [x], fisher="exact", ekfac=True)["0"]
    assert entry.scale() == pytest.approx((ggn_block(net, "0", x).trace() / entry.block().trace()).item(), rel=1e-9)


def test_sampled_labels_converge_to_all_classes_weighted():
    net, x = mlp(), randn(8, 4)
    exact = collect(net, [x], fisher="exact")["0"].G
    errors = []
    for samples in (16, 256):
        runs = [collect(net, [x], samples=samples, generator=torch.Generator().manual_seed(seed))["0"].G for seed in range(4)]
        errors.append(sum((run - exact).norm().item() for run in runs) / 4)
        if samples == 256:
            mean = torch.stack(runs).mean(0)
            assert (mean - exact).norm() < 0.12 * exact.norm()
    # 1 / sqrt(16) = 1 / 4
    assert errors[1] < errors[0] / 2


def test_several_samples_cost_one_forward_pass_and_average():
    net, x, calls = mlp(), randn(8, 4), []
    net.register_forward_hook(lambda *_: calls.append(1))
    many = collect(net, [x], samples=3, generator=torch.Generator().manual_seed(1))["0"]
    assert len(calls) == 1
    generator = torch.Generator().manual_seed(1)
    single = [collect(net, [x], generator=generator)["0"].G for _ in range(3)]
    torch.testing.assert_close(many.G, sum(single) / 3)


def test_positions_of_an_output_map_each_have_their_label():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1)).double()
    x = randn(1, 2, 2, 2)
    assert near(collect(net, [x], fisher="exact", ekfac=True)["0"].second.sum(), sum(_position_traces(net, x)))


def _position_traces(net, x):
    z = net(x)[0].detach()
    for row in range(2):
        for column in range(2):
            p = z[:, row, column].softmax(0)
            yield (p.diag() - p[:, None] * p).trace() * (x[0, :, row, column].square().sum() + 1)
