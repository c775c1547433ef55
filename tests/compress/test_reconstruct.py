"""Oracle: ridge regression by `lstsq` on windows cut out one by one; networks with copies of channels, whose loss can be undone exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.decompose import factorize
from compress.errors import RunError, UserError
from compress.graph import trace
from compress.plan import Plan
from compress.reconstruct import DAMPING, reconstruct
from compress.surgery import apply_prune

X = torch.randn(24, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [(X[:16], None), (X[16:], None)]


def network(**options):
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), **options),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)).double().eval()


def pruned(model, removals):
    graph = trace(model, X[:1])
    step = graph.step(removals)
    small = copy.deepcopy(model)
    apply_prune(small, step)
    return small, Plan([step])


def windows(layer, x):
    """[images * positions, c kh kw] of an ungrouped convolution, one window at a time."""
    (top, left), (down, right), (kh, kw), (dh, dw) = layer.padding, layer.stride, layer.kernel_size, layer.dilation
    x = functional.pad(x, (left, left, top, top))
    rows, columns = (x.shape[2] - dh * (kh - 1) - 1) // down + 1, (x.shape[3] - dw * (kw - 1) - 1) // right + 1
    return torch.stack([x[n, :, i * down:i * down + dh * (kh - 1) + 1:dh, j * right:j * right + dw * (kw - 1) + 1:dw].flatten()
                        for n in range(len(x)) for i in range(rows) for j in range(columns)])


def ridge(inputs, wanted, weight, bias, damping=DAMPING):
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    start = torch.cat([weight.flatten(1), bias[:, None]], 1)
    pull = (damping * inputs.square().sum(0).mean()).sqrt()
    stacked = torch.cat([inputs, pull * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    return torch.linalg.lstsq(stacked, torch.cat([wanted, pull * start.T])).solution.T


def rows(y):
    return y.movedim(1, -1).flatten(0, -2)


def test_every_layer_is_the_ridge_regression_on_what_it_really_reads():
    model = network()
    small, plan = pruned(model, {trace(model, X[:1]).groups[0].name: [1, 4, 5], trace(model, X[:1]).groups[1].name: [0, 7]})
    before = copy.deepcopy(small)
    fits = reconstruct(small, model, plan, BATCHES)
    assert list(fits) == ["3", "7"] and all(fit.after < fit.before for fit in fits.values())
    assert torch.equal(small[0].weight, before[0].weight)  # reads and gives what it did
    inputs = before[:3](X)
    expected = ridge(windows(before[3], inputs), rows(model[:4](X)[:, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]]), before[3].weight, before[3].bias)
    torch.testing.assert_close(torch.cat([small[3].weight.flatten(1), small[3].bias[:, None]], 1), expected, rtol=1e-6, atol=1e-8)
    missed = (rows(small[:4](X)) - rows(model[:4](X)[:, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]])).square().sum()
    assert fits["3"].after == pytest.approx((missed / model[:4](X)[:, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]].square().sum()).item(), rel=1e-6)
    expected = ridge(small[:7](X), model(X), before[7].weight, before[7].bias)  # behind the layer that was fitted already
    torch.testing.assert_close(torch.cat([small[7].weight, small[7].bias[:, None]], 1), expected, rtol=1e-6, atol=1e-8)


def test_what_copies_carried_comes_back_exactly():
    model = network()
    with torch.no_grad():
        for layer in (0, 3):
            model[layer].weight[4:8] = model[layer].weight[:4]
            model[layer].bias[4:8] = model[layer].bias[:4]
    graph = trace(model, X[:1])
    small, plan = pruned(model, {graph.groups[0].name: [4, 5, 6, 7], graph.groups[1].name: [4, 5, 6, 7]})
    assert (small(X) - model(X)).abs().max() > 0.01
    reconstruct(small, model, plan, BATCHES, damping=1e-12)
    torch.testing.assert_close(small(X), model(X), rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_layers_are_fitted_group_by_group(groups):
    model = network(groups=groups)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small[0].weight.mul_(1 + 0.2 * torch.arange(8.0)[:, None, None, None])  # every layer reads something else now
    fits = reconstruct(small, model, [], BATCHES, damping=1e-12, exclude=["0"])
    assert set(fits) == {"3", "7"}
    c, o = 8 // groups, 12 // groups
    for group in range(groups):
        part = nn.Conv2d(c, o, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).double()
        inputs, wanted = small[:3](X)[:, group * c:(group + 1) * c], rows(model[:4](X)[:, group * o:(group + 1) * o])
        expected = ridge(windows(part, inputs), wanted, model[3].weight[group * o:(group + 1) * o], model[3].bias[group * o:(group + 1) * o], 1e-12)
        mine = slice(group * o, (group + 1) * o)
        torch.testing.assert_close(torch.cat([small[3].weight[mine].flatten(1), small[3].bias[mine, None]], 1), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["svd", "tucker2", "cp"])
def test_the_last_factor_of_a_block_is_fitted(method):
    model = network()
    small = copy.deepcopy(model)
    block = small[3] = factorize(model[3], method, (3, 3) if method == "tucker2" else 3)
    inner = [child.weight.clone() for child in list(block.children())[:-1]]
    fits = reconstruct(small, model, [], BATCHES)
    assert fits["3"].after < 0.98 * fits["3"].before and all(torch.equal(child.weight, old) for child, old in zip(block.children(), inner))
    missed = (small[:4](X) - model[:4](X)).square().sum() / model[:4](X).square().sum()
    assert fits["3"].after == pytest.approx(missed.item(), rel=1e-6)
    assert not [name for name in fits if name.startswith("3.")]


def test_nothing_else_is_touched_and_an_equal_network_needs_no_fit():
    model = network().train()
    with torch.no_grad():
        model[1].running_mean.add_(0.3)
    same = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    assert reconstruct(same, model, [], BATCHES) == {}
    small, plan = pruned(model, {trace(model, X[:1]).groups[0].name: [0, 1]})
    buffers = copy.deepcopy(dict(small.named_buffers()))
    reconstruct(small, model, plan, BATCHES)
    assert model.training and small.training and all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(buffers[key], value) for key, value in small.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for network_ in (model, small) for module in network_.modules())


class Shared(nn.Module):
    """One layer called twice, one frozen, one without bias that reads the shared one's outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.frozen, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))))


def test_layers_that_cannot_be_fitted_stay_as_they_are():
    model, x = Shared().double(), torch.randn(64, 6, dtype=torch.float64)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.first.weight[0] = 0
    kept = copy.deepcopy(small)
    fits = reconstruct(small, model, [], [(x, None)])
    assert {"first"} <= set(fits) <= {"first", "head"} and fits["first"].after < 1e-6
    for pattern in ("fir*", "first.weight"):
        small = copy.deepcopy(kept)
        assert set(reconstruct(small, model, [], [(x, None)], exclude=[pattern])) == {"head"}
    for part in ("first", "twice", "frozen"):
        assert torch.equal(small.get_submodule(part).weight, kept.get_submodule(part).weight)
    expected = torch.linalg.lstsq(torch.cat([y := small.frozen(small.twice(torch.relu(small.twice(torch.relu(small.first(x)))))).detach(),
                                             (DAMPING * y.square().sum(0).mean()).sqrt() * torch.eye(8, dtype=torch.float64)]),
                                  torch.cat([model(x).detach(), (DAMPING * y.square().sum(0).mean()).sqrt() * kept.head.weight.detach().T])).solution.T
    torch.testing.assert_close(small.head.weight, expected, rtol=1e-3, atol=1e-4)


class Tenth(nn.Linear):
    """A layer that does something else with its weight than a linear layer."""

    def forward(self, x):
        return functional.linear(x, self.weight * 0.1, self.bias)


def test_subclasses_stay_and_hooks_of_the_user_act_outside():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Tenth(16, 16), nn.ReLU(), nn.Linear(16, 4)).double(), torch.randn(200, 6, dtype=torch.float64)
    model[4].register_forward_hook(lambda module, inputs, output: output * 3)
    model[4].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    small, plan = copy.deepcopy(model), []
    with torch.no_grad():
        small[2].weight[:3] = 0
    kept = small[2].weight.clone()
    fits = reconstruct(small, model, plan, [(x, None)])
    assert set(fits) == {"4"} and torch.equal(small[2].weight, kept)
    bare, mine = (functional.linear(0.5 * net[:4](x), net[4].weight, net[4].bias) for net in (model, small))
    assert ((mine - bare).square().sum() / bare.square().sum()).item() == pytest.approx(fits["4"].after, rel=1e-6)


def test_bad_input_is_one_sentence():
    model = network()
    small, plan = pruned(model, {trace(model, X[:1]).groups[0].name: [0, 1]})
    with pytest.raises(UserError, match="got none"):
        reconstruct(small, model, plan, [])
    with pytest.raises(UserError, match="zeros would not stay"):
        reconstruct(small, model, [{"kind": "mask"}], BATCHES)
    with pytest.raises(UserError, match="give all steps from the original"):
        reconstruct(small, model, [], BATCHES)
    with pytest.raises(UserError, match="above 0"):
        reconstruct(small, model, plan, BATCHES, damping=0)
    with pytest.raises(RunError, match="NaN or infinity"):
        reconstruct(small, model, plan, [(X * float("nan"), None)])
    with pytest.raises(UserError, match="Reconstruction needs calibration data"):
        compress(model.float(), X[:1].float(), reconstruct=True)
    with pytest.raises(UserError, match="makes masks"):
        compress(model, X[:1].float(), [(X.float(), torch.zeros(24, dtype=torch.long))], method="mask_magnitude", budget={"weights": 0.5}, reconstruct=True)


@pytest.mark.parametrize("method", ["l1", "kfac_cp", "svd"])
def test_compress_comes_nearer_to_the_original(method):
    model = network().float()
    batches = [(x.float(), torch.arange(len(x)) % 5) for x, _ in BATCHES]
    far, near = (compress(model, X[:1].float(), batches, method=method, budget={"macs": 0.4}, recalibrate=False, reconstruct=value)[0] for value in (False, True))
    assert (near(X.float()) - model(X.float())).square().sum() < 0.5 * (far(X.float()) - model(X.float())).square().sum()
