"""Oracle: inputs that depend linearly on each other, which a consumer can make up for exactly; and repetition."""

import copy

import pytest
import torch
from torch import nn

from compress import compress
from compress.cost import count
from compress.graph import trace
from compress.methods import Context, method


def _dependent():
    """A linear network in which hidden channels 4..7 are copies of 0..3, so that half of them can go without loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4]
        model[0].bias[4:] = model[0].bias[:4]
    return model.double().eval()


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 3, 6, 6, generator=generator, dtype=torch.float64), torch.randint(0, 10, (64,), generator=generator))]


def test_the_obs_kinds_pass_on_what_dependent_channels_carried():
    model, batches = _dependent(), _batches()
    x = batches[0][0]
    ratio = 1 - (3 * 4 * 9 * 36 + 4 * 6 * 9 * 36 + 60) / (3 * 8 * 9 * 36 + 8 * 6 * 9 * 36 + 60)
    change = {}
    for name in ("l1", "kron_obs"):
        context = Context(model, trace(model, x[:1]), x[:1], batches, nn.functional.cross_entropy, torch.Generator().manual_seed(0))
        chosen = method(name)
        scores = {group.name: torch.arange(group.size).flip(0) if group.size == 8 else 100.0 + torch.arange(group.size) for group in context.graph.groups if group.prunable}
        small = _dependent()
        chosen.apply(small, context, scores, {"macs": ratio})
        assert small[0].weight.shape[0] == 4
        change[name] = float((small(x) - model(x)).abs().max() / model(x).abs().max())
    assert change["l1"] > 0.1
    assert change["kron_obs"] < 1e-3


@pytest.mark.parametrize("name", ["random", "taylor_fo", "kron_obs", "woodfisher", "obd", "c_obs", "hessian_trace"])
def test_the_same_call_gives_the_same_network(name):
    model, batches = _dependent().float(), [(x.float(), y) for x, y in _batches()]
    first, second = (compress(model, batches[0][0][:1], batches, method=name, budget={"params": 0.4})[0] for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


class _Stubborn(nn.Module):
    """Divides by a width written into its code: cutting `a` computes something else, which only the check after surgery can see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        y = self.a(x)
        y = torch.relu(y / y.shape[1])
        return self.head(torch.relu(self.c(torch.relu(self.b(y)))).mean((2, 3)))


def test_a_group_that_fails_the_check_is_pinned_and_the_budget_met_by_the_others():
    torch.manual_seed(0)
    model, x = _Stubborn().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x, probe=False)
    context = Context(model, graph, x, [], nn.functional.cross_entropy, torch.Generator().manual_seed(0))
    chosen = method("l1")
    result = copy.deepcopy(model)
    chosen.apply(result, context, chosen.prepare(context), {"macs": 0.4})
    assert result.a.weight.shape[0] == 16 and result.b.weight.shape[0] < 16
    assert 1 - count(result, x).macs / count(model, x).macs == pytest.approx(0.4, abs=0.02)
    assert "a.weight" in graph.pinned
