"""Oracle: the network itself: which modules its forward pass calls, and which parameters they have in common."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress, save, load
from compress.decompose.modules import Calls
from compress.decompose.targets import candidates, left_alone, observe, targets
from compress.errors import UserError

X = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(24) % 4)]
NAMES = ["svd", "tucker", "cp", "kfac_svd", "kfac_tucker", "eigendamage", "eigendamage_depthwise", "improved_eigendamage"]


class Mixed(nn.Module):
    """`a` and `b` with one weight, `read` whose weight is used and which is never called, `free`, and one layer with two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.free, self.read = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.a, self.b, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False), nn.Linear(32, 4)
        self.b.weight, self.again = self.a.weight, self.free

    def forward(self, x):
        x = self.b(self.a(self.stem(x)).relu()).relu()
        x = functional.linear(self.again(self.free(x).relu()), self.read.weight, self.read.bias)
        return self.head(x.relu())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


def test_every_call_is_seen_under_the_first_name(model):
    calls = observe(model, X[:3])
    assert calls["free"] == Calls(((3, 32), (3, 32)), 3) and calls["a"] == calls["b"] == Calls(((3, 32),), 3)
    assert "read" not in calls and "again" not in calls
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_observing_disturbs_nothing_even_where_the_network_raises(model):
    model.add_module("norm", nn.BatchNorm1d(4))
    model.train()
    with pytest.raises(RuntimeError):
        observe(model, X[:, :5])
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_share_a_parameter_or_are_never_called_stay_with_the_reason(model):
    found, reasons = candidates(model, (), observe(model, X[:1]))
    assert list(found) == ["stem", "free", "head"]
    assert "'b'" in reasons["a"] and "'a'" in reasons["b"] and "never calls it" in reasons["read"]
    assert list(targets(model, called=observe(model, X[:1]))) == ["stem", "free"]


def test_the_last_linear_layer_is_the_last_that_is_called(model):
    model.add_module("unused", nn.Linear(4, 4))
    called = observe(model, X[:1])
    assert "head" not in targets(model, called=called) and "last" in left_alone(model, called=called)["head"]
    assert "never calls it" in left_alone(model, called=called)["unused"]


def test_a_parameter_of_the_module_around_is_shared_too():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.register_parameter("copy", net[0].weight)
    assert "network itself" in candidates(net)[1]["0"] and list(candidates(net)[0]) == ["1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_around_them_and_the_report_names_them(model, name, tmp_path):
    options = {"cap": 0.95} if name == "improved_eigendamage" else {}
    small, plan, report = compress(model, X[:1], BATCHES, method=name, budget={"params": 0.2}, options=options)
    assert 0.19 <= report.params_removed <= 0.3
    assert {"a", "b", "read"} <= set(report.pinned) == set(plan.meta["skipped"]) and set(report.ranks) <= {"stem", "free", "head"}
    assert small.a.weight is small.b.weight and torch.equal(small.read.weight, model.read.weight)
    save(small, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, Mixed()).eval()(X), small(X))


@pytest.mark.parametrize("name", ["svd", "tucker", "kfac_svd"])
def test_what_a_budget_cannot_reach_because_of_them_is_one_sentence(model, name):
    with pytest.raises(UserError, match="cannot be reached: at most 0"):
        compress(model, X[:1], BATCHES, method=name, budget={"params": 0.9})


@pytest.mark.parametrize("name", NAMES[:5])
def test_the_reasons_are_given_where_nothing_has_to_go(model, name):
    _, plan, report = compress(model, X[:1], BATCHES, method=name, budget={"params": 0.0})
    assert report.ranks == {} and {"a", "b", "read"} == set(report.pinned)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_alone_is_refused_in_one_sentence(name):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="nn.Sequential") as raised:
        compress(nn.Linear(12, 4), X[:1], BATCHES, method=name, budget={"params": 0.1}, options={"skip_last": False, "cap": 0.95} if "eigen" in name else {})
    assert "\n" not in str(raised.value)


def test_layers_cut_in_vain_are_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    for name, options in (("eigendamage", {}), ("improved_eigendamage", {"cap": 0.95})):
        _, _, report = compress(net, X[:1], BATCHES, method=name, budget={"params": 0.3}, options=options | {"skip_last": False, "fisher": "exact"})
        left = {layer for layer in ("0", "2", "4") if layer not in report.ranks}
        assert left and all("no smaller" in report.pinned[layer] for layer in left & set(report.pinned))
        assert report.ranks and not set(report.ranks) & set(report.pinned) and set(report.pinned) & left


@pytest.mark.parametrize(("pattern", "left"), [("head", {"body"}), ("head.1", {"body", "head.0"}), ("head.*.weight", {"body"}), ("head.0.bias", {"body", "head.1"})])
def test_a_pattern_may_name_the_layer_a_module_around_it_or_a_parameter(pattern, left):
    model = nn.Module()
    model.body, model.head = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert set(candidates(model, [pattern])[0]) == left
