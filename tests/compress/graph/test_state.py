"""Oracle: the network's own state before the call, bit for bit, and hand-written expectations of what surgery must keep."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_globals

from compress.errors import RunError, UserError
from compress.graph import trace
from tests.compress.graph.micro import Net, conv
from tests.compress.graph.oracle import outputs


class Small(nn.Module):
    """conv - BatchNorm - conv - linear."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.fc = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3)))


class Stubborn(nn.Module):
    """A width that stands in the program: removing channels of `b` must fail, removing those of `a` must not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 6), nn.Linear(6 * 16, 4)

    def forward(self, x):
        return self.fc(self.b(F.relu(self.a(x))).view(-1, 6 * 16))


X = torch.zeros(2, 3, 4, 4)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)


def test_tracing_changes_nothing():
    model = Small()
    model.train()
    model.b.eval()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    before, grads, modes = snapshot(model), [p.grad.clone() for p in model.parameters()], [m.training for m in model.modules()]
    random_state, hooks = torch.get_rng_state(), (len(module_globals._global_forward_hooks), len(module_globals._global_forward_pre_hooks))
    trace(model, X)
    assert same(before, snapshot(model))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (len(module_globals._global_forward_hooks), len(module_globals._global_forward_pre_hooks)) == hooks


def test_surgery_keeps_modes_flags_objects_and_random_state():
    model = Small().train()
    model.a.eval()
    model.b.weight.requires_grad_(False)
    model.bn.requires_grad_(False)
    parameters, flags = list(model.parameters()), [p.requires_grad for p in model.parameters()]
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    graph = trace(model, X)
    graph.prune(model, {"a.weight": [0, 7], "b.weight": [2]})
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (model.a.out_channels, model.bn.num_features, model.b.in_channels, model.b.out_channels, model.fc.in_features) == (6, 6, 6, 5, 5)
    assert model.bn.running_var.shape == (6,)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_frozen_layers_are_pruned_too():
    model = Small().requires_grad_(False)
    assert {group.name for group in trace(model, X).groups if group.prunable} == {"a.weight", "b.weight"}


def test_training_goes_on_with_the_same_optimiser():
    model = Small()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    trace(model, X).prune(model, {"a.weight": [1, 2]})
    assert all(p.grad is None for p in (model.a.weight, model.a.bias, model.b.weight))
    optimiser.zero_grad()
    before = model.a.weight.detach().clone()
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimiser.step()
    assert model.a.weight.grad.shape == (6, 3, 3, 3)
    assert not torch.equal(before, model.a.weight)


def test_ties_stay_ties():
    shared = conv(8, 8)
    model = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.d(m.a(x)))))), a=conv(3, 8), b=shared, c=conv(8, 4), d=conv(8, 8))
    model.d.weight = model.b.weight
    graph = trace(model, X)
    graph.prune(model, {graph.groups[0]: [0, 3, 5]})
    assert model.d.weight is model.b.weight and model.b.weight.shape == (5, 5, 3, 3)


def test_tensors_that_share_memory_without_being_one_stay():
    model = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    model.c = conv(8, 8)
    model.c.weight = nn.Parameter(model.b.weight.data)
    graph = trace(model, X)
    assert not any(group.prunable for group in graph.groups)
    assert "shares its memory" in graph.pinned["b.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_stays(dtype):
    model = Small().to(dtype)
    trace(model, X.to(dtype)).prune(model, {"a.weight": [0], "b.weight": [5]})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype, torch.int64}


def test_memory_format_stays():
    model = Small().to(memory_format=torch.channels_last)
    trace(model, X).prune(model, {"a.weight": [0], "b.weight": [5]})
    assert model.b.weight.shape == (5, 7, 3, 3) and model.b.weight.is_contiguous(memory_format=torch.channels_last)


def test_failed_surgery_is_taken_back_and_names_group_and_operator():
    model = Stubborn()
    before, text = snapshot(model), repr(model)
    graph = trace(model, X, probe=False)
    with pytest.raises(RunError, match=r"'b\.weight'.*view"):
        graph.prune(model, {"a.weight": [0, 1], "b.weight": [0]})
    assert same(before, snapshot(model)) and repr(model) == text


def test_failed_group_can_be_pinned_and_the_rest_is_pruned():
    model = Stubborn()
    graph = trace(model, X, probe=False)
    step = graph.prune(model, {"a.weight": [0, 1], "b.weight": [0]}, on_failure="pin")
    assert model.a.out_channels == 6 and model.b.out_channels == 6
    assert set(step["slices"]) == {"a.weight", "a.bias", "b.weight"}
    group = next(group for group in graph.groups if group.name == "b.weight")
    assert not group.prunable and "view" in group.reason
    assert graph.count() == trace(Stubborn(), X).count(), "a pinned group leaves the counts of the whole network as they were"


def test_probing_finds_the_stubborn_group_before_anybody_relies_on_it():
    graph = trace(Stubborn(), X)
    assert {group.name: group.prunable for group in graph.groups} == {"a.weight": True, "b.weight": False, "fc.weight": False}
    assert "aten.view" in graph.pinned["b.weight"]


def test_excluded_layers_keep_their_shapes():
    model = Small()
    graph = trace(model, X, exclude=["b"])
    assert not any(group.prunable for group in graph.groups)
    assert graph.pinned["b.weight"] == "excluded by 'b'"
    graph = trace(model, X, exclude=["*.bias"])
    assert not any(group.prunable for group in graph.groups)
    graph = trace(model, X, exclude=["f?"])
    assert [group.name for group in graph.groups if group.prunable] == ["a.weight"]


def test_one_channel_always_stays_and_numbers_are_checked():
    model = Small()
    graph = trace(model, X)
    for removals, words in (({"a.weight": range(8)}, "at least one must stay"), ({"a.weight": [8]}, "0 to 7"),
                            ({"a.weight": [1, 1]}, "different numbers"), ({"a.weigth": [1]}, "did you mean 'a.weight'"),
                            ({"fc.weight": [0]}, "output of the network")):
        with pytest.raises(UserError, match=words):
            graph.prune(model, removals)
    graph.prune(model, {"a.weight": [0]})
    with pytest.raises(UserError, match="trace it again"):
        graph.prune(model, {"a.weight": [0]})


@pytest.mark.parametrize("wrap, words", [(nn.DataParallel, "DataParallel"), (torch.jit.script, "scripted")])
def test_wrappers_are_refused(wrap, words):
    with pytest.raises(UserError, match=words):
        trace(wrap(Small()), X)


def test_faults_of_the_example_and_of_patterns_are_one_sentence():
    with pytest.raises(RunError, match=r"^The network could not be run on the example inputs: RuntimeError"):
        trace(Small(), torch.zeros(2, 5, 4, 4))
    with pytest.raises(UserError, match="matches no module"):
        trace(Small(), X, exclude=["c*"])
    with pytest.raises(UserError, match="has no shape yet"):
        trace(nn.Sequential(nn.LazyConv2d(4, 3)), X)


def test_two_traces_agree():
    model = Small()
    first, second = trace(model, X), trace(copy.deepcopy(model), X)
    assert [(g.name, g.size, g.prunable) for g in first.groups] == [(g.name, g.size, g.prunable) for g in second.groups]
    assert all(torch.equal(a.indices, b.indices) for g, h in zip(first.groups, second.groups) for a, b in zip(g.members, h.members))


def test_pruning_in_three_rounds_gives_the_same_network_as_in_one():
    once, thrice = Small(), Small()
    thrice.load_state_dict(once.state_dict())
    trace(once, X).prune(once, {"a.weight": [0, 1, 2], "b.weight": [0, 1, 2]})
    for _ in range(3):
        trace(thrice, X).prune(thrice, {"a.weight": [0], "b.weight": [0]})
    assert same(snapshot(once), snapshot(thrice))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(outputs(once, x)[0], outputs(thrice, x)[0])


def test_coverage_says_what_happens_to_every_layer():
    model = Net(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4), unused=conv(3, 5))
    rows = {row.layer: (row.status, row.reason) for row in trace(model, X).coverage()}
    assert rows["a"] == ("coupled", "with b.weight")
    assert rows["b"] == ("coupled", "with a.weight")
    assert rows["c"] == ("pinned", "output of the network")
    assert rows["unused"][0] == "pinned"


def test_layer_costs_are_per_example_and_per_weight():
    """Closed forms: h w k^2 c_in c_out, twice for a layer that runs twice."""
    model = Net(lambda m, x: m.fc(m.b(m.b(m.a(x))).mean((2, 3))), a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 4))
    graph = trace(model, X)
    assert {layer.weight: layer.macs for layer in graph.layers} == {"a.weight": 16 * 9 * 24, "b.weight": 2 * 16 * 9 * 64, "fc.weight": 32}
    assert graph.count() == (sum(p.numel() for p in model.parameters()), 16 * 9 * 24 + 2 * 16 * 9 * 64 + 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_a_gpu_stays_there():
    model = Small().cuda()
    graph = trace(model, X)
    graph.prune(model, {"a.weight": [0], "b.weight": [5]})
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert model(torch.randn(2, 3, 4, 4, device="cuda")).shape == (2, 4)
