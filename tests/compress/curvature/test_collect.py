"""Oracle: laws (splitting, order, repetition, sampling) and a snapshot of everything that statistics must leave alone."""

import copy

import pytest
import torch
from torch import nn

from compress.curvature import collect, ekfac, squared_gradients
from compress.decompose import factorize
from compress.errors import RunError, UserError
from tests.compress.curvature.nets import convnet, mlp, randn
from tests.oracles.curvature import ggn_block


def differing(left, right, rtol=1e-7, atol=1e-7):
    """Which statistics of which layers are not the same in both."""
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    pairs = {(name, kind): (getattr(left[name], kind), getattr(right[name], kind)) for name in left for kind in ("A", "G", "second")}
    return [place for place, (a, b) in pairs.items() if (a is None) != (b is None) or a is not None and not torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol)]


@pytest.mark.parametrize("patch", ["full", "channel", "pixel"])
def test_splitting_and_order_of_the_images_do_not_matter(patch):
    net, x = convnet(), randn(7, 2, 8, 9)
    whole = collect(net, [x], fisher="exact", patch=patch, ekfac=True)
    assert not differing(whole, collect(net, [x[:3], x[3:6], x[6:]], fisher="exact", patch=patch, ekfac=True))
    assert not differing(whole, collect(net, [x.flip(0)], fisher="exact", patch=patch, ekfac=True))
    assert whole["0"].n == 7 and whole["0"].positions == 72


def test_channel_moments_are_the_mean_diagonal_blocks_of_the_full_ones():
    net, x = convnet(), randn(4, 2, 8, 9)
    full, channel = collect(net, [x], fisher="exact"), collect(net, [x], fisher="exact", patch="channel")
    for name, c, kk in (("0", 2, 9), ("5", 6, 4)):
        blocks = full[name].weight_A.reshape(c, kk, c, kk)
        torch.testing.assert_close(channel[name].A, torch.einsum("cidi->cd", blocks) / kk)
        assert not channel[name].bias
    torch.testing.assert_close(channel["9"].A, full["9"].A)
    assert channel["9"].bias and full["0"].bias and not full["5"].bias


def test_the_bias_is_a_coordinate_that_is_always_one():
    net, x = convnet(), randn(4, 2, 8, 9)
    entry = collect(net, [x], fisher="exact")["0"]
    padded = nn.functional.unfold(x, 3, padding=1)
    assert entry.A[-1, -1].item() == pytest.approx(72)
    torch.testing.assert_close(entry.A[-1, :-1], padded.sum((0, 2)) / 4)
    torch.testing.assert_close(collect(net, [x], fisher="exact", bias=False)["0"].A, entry.weight_A)


def test_ekfac_over_channels_corrects_every_kernel_offset():
    net, x = convnet(), randn(4, 2, 8, 9)
    net.eval()
    entry = collect(net, [x], fisher="exact", patch="channel", ekfac=True)["5"]
    assert entry.second.shape == (4, 6, 4)
    exact = ggn_block(net, "5", x)
    q_a, q_g = (spectrum.vectors for spectrum in entry.eigen())
    basis = torch.kron(q_g, torch.kron(q_a, torch.eye(4, dtype=torch.float64)))
    torch.testing.assert_close(entry.second.flatten(), (basis.T @ exact @ basis).diagonal())
    assert (entry.block(corrected=True) - exact).norm() <= (entry.block() - exact).norm()


def test_squared_gradients_are_the_diagonal_of_the_exact_block():
    net, x = convnet(), randn(4, 2, 8, 9)
    net.eval()
    squares = squared_gradients(net, [x[:1], x[1:]], fisher="exact")
    torch.testing.assert_close(squares["5"].flatten(), ggn_block(net, "5", x).diagonal())
    torch.testing.assert_close(squares["3"], ggn_block(net, "3", x).diagonal().reshape(6, 13)[:, :12])


class Twice(nn.Module):
    """One convolution called at two resolutions, an in-place sum, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.shared(self.first(x)).relu_()
        x = self.shared(x[:, :, ::2, ::2]).relu_()
        return self.head(x.mean((2, 3)))


def test_a_layer_called_twice_counts_all_its_positions_and_its_whole_gradient():
    torch.manual_seed(0)
    net, x = Twice().double(), randn(3, 2, 6, 6)
    factors = collect(net, [x], fisher="exact", ekfac=True)
    assert set(factors) == {"first", "shared", "head"}
    assert factors["shared"].positions == 36 + 9
    exact = ggn_block(net, "shared", x)
    assert factors["shared"].second.sum().item() == pytest.approx(exact.trace().item(), rel=1e-10)
    inputs = []
    handle = net.shared.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    net(x)
    handle.remove()
    expected = sum(torch.einsum("bct,bdt->cd", u, u) for u in (nn.functional.unfold(i, 3, padding=1) for i in inputs)) / 3
    torch.testing.assert_close(factors["shared"].weight_A, expected)


def test_in_place_activations_give_the_same_statistics():
    assert not differing(*(collect(convnet(in_place=flag), [randn(4, 2, 8, 9)], fisher="exact", ekfac=True) for flag in (True, False)))


def test_a_relu_in_place_directly_behind_the_first_layer_is_seen_before_it():
    net, x = mlp(widths=(4, 5, 3)), randn(6, 4)
    net[1] = nn.ReLU(inplace=True)
    torch.testing.assert_close(collect(net, [x], fisher="exact")["0"].G, collect(mlp(widths=(4, 5, 3)), [x], fisher="exact")["0"].G)


def snapshot(net):
    return ({name: tensor.clone() for name, tensor in net.state_dict().items()}, [module.training for module in net.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()], torch.get_rng_state(),
            torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())


def assert_untouched(net, before):
    after = snapshot(net)
    assert after[1:2] + after[3:4] + after[5:] == before[1:2] + before[3:4] + before[5:]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0]) and torch.equal(after[4], before[4])
    for (flag, grad), (old_flag, old_grad) in zip(after[2], before[2], strict=True):
        assert flag == old_flag and ((grad is None) if old_grad is None else torch.equal(grad, old_grad))


@pytest.mark.parametrize("training", [False, True])
def test_network_is_left_as_it_was(training):
    net, x = convnet(), randn(4, 2, 8, 9)
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    net[2].eval()
    before = snapshot(net)
    with torch.no_grad():
        collect(net, [x], ekfac=True, training=training)
        squared_gradients(net, [x])
    assert_untouched(net, before)


class Broken(nn.Module):
    def __init__(self, inner, fail_at):
        super().__init__()
        self.inner, self.fail_at, self.calls = inner, fail_at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            self.inner(x)
            raise ValueError("the user's own fault")
        return self.inner(x)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_network_is_left_as_it_was_when_it_raises(fail_at):
    net, x = Broken(convnet(), fail_at), randn(4, 2, 8, 9)
    net.train()
    before = snapshot(net)
    with pytest.raises(ValueError, match="the user's own fault"):
        collect(net, [x, x], ekfac=True)
    assert_untouched(net, before)


def test_training_mode_uses_the_statistics_of_the_batch():
    net, x = convnet(), randn(4, 2, 8, 9)
    evaluated, trained = collect(net, [x], fisher="exact"), collect(net, [x], fisher="exact", training=True)
    torch.testing.assert_close(evaluated["0"].A, trained["0"].A)
    assert not torch.allclose(evaluated["3"].A, trained["3"].A)


def test_the_loss_reduction_of_the_user_does_not_enter_and_repeats_are_equal():
    net, x = mlp(), randn(6, 4)
    assert not differing(collect(net, [x]), collect(net, [x]))
    assert not differing(collect(net, [x], fisher="exact"), collect(net, [torch.cat([x, x])], fisher="exact"))


def test_sampled_positions_are_unbiased():
    net, x = convnet(), randn(3, 2, 8, 9)
    full = collect(net, [x], fisher="exact")
    generator = torch.Generator().manual_seed(3)
    runs = [collect(net, [x], fisher="exact", positions=8, generator=generator) for _ in range(150)]
    for name in ("0", "3", "5"):
        for kind in ("A", "G"):
            values = torch.stack([getattr(run[name], kind) for run in runs])
            exact = getattr(full[name], kind)
            assert (values[0] - exact).norm() > 1e-3 * exact.norm()
            error = values.std(0) / len(runs) ** 0.5
            # every entry within 5 standard errors of the exact one
            assert ((values.mean(0) - exact).abs() <= 5 * error + 1e-9).all()
    everything = collect(net, [x], fisher="exact", positions=72)
    assert not differing(full, everything)


def test_moving_average_weighs_later_batches_more():
    net, x = mlp(), randn(6, 4)
    parts = [collect(net, [x[i:i + 2]], fisher="exact")["0"].A for i in (0, 2, 4)]
    moved = collect(net, [x[:2], x[2:4], x[4:]], fisher="exact", decay=0.5)["0"].A
    torch.testing.assert_close(moved, (parts[0] / 4 + parts[1] / 2 + parts[2]) / 1.75)
    assert not differing(collect(net, [x[:2], x[2:]], fisher="exact", decay=1.0), collect(net, [x], fisher="exact"))


def test_linear_layers_on_sequences_and_networks_of_several_inputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.head(torch.tanh(self.token(x)).mean(1) + y)

    torch.manual_seed(0)
    net = Pair().double()
    x, y = randn(3, 5, 3), randn(3, 4)
    factors = collect(net, [((x, y), torch.tensor([0, 1, 1]))], fisher="empirical", ekfac=True)
    ones = torch.cat([x, torch.ones(3, 5, 1, dtype=torch.float64)], 2).flatten(0, 1)
    torch.testing.assert_close(factors["token"].A, ones.T @ ones / 3)
    assert factors["token"].positions == 5


def test_attention_layers_in_evaluation_mode_are_reached():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True).double()
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))
    net.double()
    assert {"0.linear1", "0.linear2", "2"} <= set(collect(net, [randn(3, 3, 4)]))


def test_a_factorized_block_is_one_layer_when_named_and_three_otherwise():
    net, x = convnet(), randn(4, 2, 8, 9)
    dense = collect(net, [x], fisher="exact")["5"]
    net[5] = factorize(net[5], "tucker2", (4, 6), only_if_smaller=False)
    inner = collect(net, [x], fisher="exact")
    assert {"5.input", "5.core", "5.output"} <= set(inner)
    outer = collect(net, [x], fisher="exact", layers=["5"])["5"]
    torch.testing.assert_close(outer.A, dense.A)
    torch.testing.assert_close(outer.G, dense.G)


def test_float32_agrees_with_float64():
    net, x = convnet(), randn(16, 2, 8, 9)
    single = collect(copy.deepcopy(net).float(), [x.float()], fisher="exact")
    double = collect(net, [x], fisher="exact")
    assert single["0"].A.dtype == torch.float64
    assert not differing(double, single, rtol=1e-4, atol=1e-5)


def test_one_image_is_enough_and_a_dead_layer_is_zero():
    net = convnet()
    one = collect(net, [randn(1, 2, 8, 9)], ekfac=True)
    assert all(torch.isfinite(entry.A).all() and torch.isfinite(entry.second).all() for entry in one.values())
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].bias.fill_(-1)
        net[1].running_mean.zero_()
        net[0].bias.zero_()
    dead = collect(net, [randn(3, 2, 8, 9)], ekfac=True)["3"]
    assert dead.weight_A.abs().max() == 0 and dead.eigen()[0].values[..., :-1].abs().max() == 0
    assert torch.isfinite(dead.second).all()


def nan_at(index):
    x = randn(4, 2, 8, 9)
    x[index] = float("nan")
    return x


@pytest.mark.parametrize("call, kind, words", [
    (lambda: collect(convnet(), []), UserError, "No image was given"),
    (lambda: collect(convnet(), [randn(0, 2, 8, 9)]), UserError, "No image was given"),
    (lambda: collect(Twice().double(), [randn(1, 2, 8, 8)], layers=["unused"]), UserError, "'unused' was named"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], layers=["5.x"]), UserError, "no layer '5.x'"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], layers=["2"]), UserError, "is a ReLU"),
    (lambda: collect(nn.ReLU(), [randn(1, 2)]), UserError, "no Linear or Conv2d"),
    (lambda: collect(convnet(), [nan_at(2)]), RunError, "Layer '0' saw NaN or infinity in its inputs"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], fisher="empirical"), UserError, "needs labels"),
    (lambda: collect(convnet(), [(randn(1, 2, 8, 9), torch.zeros(1))], fisher="empirical"), UserError, "do not fit"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], fisher="fake"), UserError, "'fake'"),
    (lambda: collect(nn.Linear(4, 1).double(), [(randn(9, 4), randn(9))], fisher="empirical", loss="mse"), UserError, r"(9,) do not fit outputs of shape (9, 1)"),
    (lambda: collect(nn.Linear(4, 9).double(), [(randn(9, 4), randn(9))], fisher="empirical", loss="mse"), UserError, r"(9,) do not fit outputs of shape (9, 9)"),
    (lambda: collect(convnet(), [{"image": randn(1, 2, 8, 9)}]), UserError, "batch is a dict;"),
    (lambda: collect(convnet(), [({"image": randn(1, 2, 8, 9)}, torch.zeros(1))]), UserError, "batch is (dict, Tensor);"),
    (lambda: collect(convnet(), [()]), UserError, "batch is ();"),
    (lambda: squared_gradients(convnet(), [randn(1, 2, 8, 9) * torch.nan]), RunError, "NaN"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], samples=0), UserError, "got 0"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], patch="window"), UserError, "'window'"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], positions=0), UserError, "got 0"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], decay=1.5), UserError, "1.5"),
    (lambda: collect(convnet(), [randn(1, 2, 8, 9)], sharing="reduce", patch="channel"), UserError, "'reduce'"),
    (lambda: collect(nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)).double(), [randn(1, 2)]), UserError, "(2,)"),
    (lambda: squared_gradients(convnet(), []), UserError, "No image"),
])
def test_bad_input_is_one_sentence(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_generator_of_batches_is_read_twice_for_ekfac_by_collect_and_refused_by_ekfac_alone():
    net, x = mlp(), randn(6, 4)
    assert not differing(collect(net, (x[i:i + 2] for i in (0, 2, 4)), fisher="exact", ekfac=True), collect(net, [x], fisher="exact", ekfac=True))
    with pytest.raises(UserError, match="readable twice"):
        ekfac(net, iter([]), collect(net, [x]))


def test_an_input_overwritten_before_its_gradient_is_named():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.a(x)
            out = self.b(hidden)
            hidden.zero_()
            return out

    net = Overwrites().double()
    collect(net, [randn(2, 3)])
    with pytest.raises(RunError, match="'b' was overwritten"):
        collect(net, [randn(2, 3)], ekfac=True)
