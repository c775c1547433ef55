"""Oracle: counts of the materialised network (compress.cost), whatever layers are called with and however often."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress import compress
from compress.cost import count
from compress.decompose import cp, svd, tucker2
from compress.decompose.modules import Calls, build_block, layer_cost, replace_module
from compress.decompose.rounds import EigenDamageOptions, accepted, apply_round, scores, select
from compress.decompose.targets import observe
from compress.graph import trace
from compress.methods import Context, method
from compress.methods.menus import build_menu

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(24) % 4)]


class Repeated(nn.Module):
    """A convolution that is called four times, at two sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(2):
            x = self.a(x).relu()
        x = functional.max_pool2d(x, 2)
        for _ in range(2):
            x = self.a(input=x).relu()
        return self.head(self.b(x).relu().mean((2, 3)))


class Windows(nn.Module):
    """Linear layers on 16 windows of 4 positions per image, folded into the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x):
        n, x = len(x), self.stem(x).relu().flatten(2).transpose(1, 2)
        x = self.down(self.up(x.reshape(n * 16, 4, 16)).relu())
        return self.head(x.reshape(n, 64, 16).mean(1))


class Leading(nn.Module):
    """Linear layers on [n, 8, 8, features]."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu().permute(0, 2, 3, 1)
        return self.head(self.down(self.up(x).relu()).mean((1, 2)))


NETWORKS = [Repeated, Windows, Leading]
EIGENDAMAGE = {"eigendamage": {}, "eigendamage_depthwise": {}, "improved_eigendamage": {"cap": 0.95}}


def built(kind):
    torch.manual_seed(0)
    return kind().eval()


def context(model, images=1):
    example = X[:images]
    return Context(model, trace(model, example), example, BATCHES, functional.cross_entropy, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_menus_and_the_rest_are_the_whole_network_before_and_after(kind, images):
    model, generator = built(kind), torch.Generator().manual_seed(1)
    for name, decompose in (("svd", lambda w, ranks: svd(w, ranks[0])), ("cp", lambda w, ranks: cp(w, ranks[0], 1) if w.ndim == 4 else svd(w, ranks[0]))):
        menus, small = method(name).prepare(context(model, images)).estimated, copy.deepcopy(model)
        picks = [int(torch.randint(len(menu.ranks), (), generator=generator)) for menu in menus]
        for menu, pick in zip(menus, picks):
            if pick:
                layer = model.get_submodule(menu.name)
                replace_module(small, menu.name, build_block(layer, decompose(layer.weight.detach(), menu.ranks[pick])))
        before, after = count(model, X[:images]), count(small, X[:images])
        assert sum(menu.costs[0][1] for menu in menus) == before.macs  # nothing but these layers multiplies
        assert sum(menu.costs[pick][1] for menu, pick in zip(menus, picks)) == after.macs
        assert sum(menu.costs[0][0] - menu.costs[pick][0] for menu, pick in zip(menus, picks)) == before.params - after.params > 0


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_eigendamage_saves_what_it_says(kind, depthwise):
    model, options = built(kind), EigenDamageOptions(fisher="exact", depthwise=depthwise)
    before = count(model, X[:1])
    entries = scores(model, BATCHES, options, example=X[:1])
    kept = select(entries, options, 0.6)
    savings = accepted(entries, kept, options)
    assert savings and apply_round(model, entries, kept, options) == list(savings)
    after = count(model, X[:1])
    assert tuple(map(sum, zip(*savings.values()))) == (before.params - after.params, before.macs - after.macs)


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("name", ["svd", "tucker", "cp", "kfac_svd", "kfac_tucker", *EIGENDAMAGE])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_budget_of_macs_is_met(kind, name, ratio):
    model = built(kind)
    small, _, report = compress(model, X[:1], BATCHES, method=name, budget={"macs": ratio}, options=EIGENDAMAGE.get(name))
    removed = 1 - count(small, X[:1]).macs / count(model, X[:1]).macs
    # one step of a rank of the layer called four times is 3.5 % of its network, and a layer is split or not
    assert ratio - 0.01 <= removed == report.macs_removed <= ratio + (0.15 if name == "eigendamage_depthwise" else 0.05)


def test_costs_do_not_depend_on_how_many_images_the_example_holds():
    model = built(Repeated)
    one, three = observe(model, X[:1]), observe(model, X[:3])
    assert one["a"] == Calls(((1, 16, 8, 8),) * 2 + ((1, 16, 4, 4),) * 2, 1)
    assert all(layer_cost(model.get_submodule(name), one[name]) == layer_cost(model.get_submodule(name), three[name]) for name in one)


def test_a_layer_that_is_called_on_the_same_input_for_any_batch_is_counted_as_the_network_is():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.position, self.head = nn.Parameter(torch.randn(7, 12)), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.head(x + self.position(self.table).mean(0))

    model, x = Table().eval(), torch.randn(5, 12)
    layer, calls = model.position, observe(model, x)["position"]
    menu = build_menu("position", layer, calls, lambda ranks: tucker2(layer.weight, ranks), (12, 12), lambda ranks: 0.0)
    assert menu.costs[0][1] == 7 * 144 // 5 == count(model, x).macs - count(nn.Sequential(model.head), x).macs
    assert all(cost[1] == 7 * (12 * ranks[0] + ranks[0] * ranks[1] + 12 * ranks[1]) // 5 for ranks, cost in list(zip(menu.ranks, menu.costs))[1:])
