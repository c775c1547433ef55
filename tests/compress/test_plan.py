"""Oracle: the pruned network itself; a replayed plan gives the same modules, and with its weights the same outputs bit for bit."""

import json

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.graph import trace
from compress.plan import Plan, apply_plan
from compress.siblings import own
from tests.compress.graph.micro import CASES

BUILD = own("models").build


def replay(build, x):
    """Prunes one network in two rounds, replays the plan on another one, loads the weights."""
    torch.manual_seed(0)
    model, plan = build().eval(), Plan(meta={"method": "test", "ratio": 0.5})
    for _ in range(2):
        graph = trace(model, x)
        plan.steps.append(graph.prune(model, {g: range(0, g.size - 1, 2) for g in graph.groups if g.prunable}))
    text = plan.to_json()
    fresh = apply_plan(build().eval(), Plan.from_json(text))
    assert repr(fresh) == repr(model)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert Plan.from_json(text) == plan and json.loads(text)["format"] == 1
    return model


def test_replay_without_tracing():
    model = replay(lambda: BUILD("resnet20", 10), torch.randn(1, 3, 8, 8))
    assert sum(p.numel() for p in model.parameters()) < 269722 / 8


@pytest.mark.parametrize("name", ["depthwise_with_multiplier", "transposed_grouped", "group_norm", "instance_norm", "concat_into_grouped"])
def test_replay_rewrites_attributes(name):
    dense = CASES[name].build()
    cut = replay(CASES[name].build, torch.randn(CASES[name].shape))
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in dense.parameters()) and repr(cut) != repr(dense)


def test_to_plan_changes_nothing_and_equals_the_step():
    model = BUILD("resnet20", 10)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    removals = {"conv1.weight": [3, 5], "layer1.0.conv1.weight": [0]}
    plan = graph.to_plan(removals, {"note": 1})
    assert sum(p.numel() for p in model.parameters()) == 269722
    assert plan == Plan([graph.prune(model, removals)], {"note": 1})


@pytest.mark.parametrize("text, words", [
    ("", "not JSON"),
    ('{"format": 1, "steps": [', "truncated"),
    ("[]", "format"),
    ('{"format": 2, "steps": []}', "format"),
    ('{"format": 1}', "steps"),
    ('{"format": 1, "steps": [{"kind": "melt"}]}', "prune"),
    ('{"format": 1, "steps": [3]}', "steps"),
    ('{"format": 1, "steps": [{"kind": "prune"}]}', "Step 0"),
    ('{"format": 1, "steps": [{"kind": "prune", "slices": {"w": {"x": [1]}}, "attributes": {}}]}', "Step 0"),
    ('{"format": 1, "steps": [{"kind": "prune", "slices": {"w": {"0": [1.5]}}, "attributes": {}}]}', "Step 0"),
    ('{"format": 1, "steps": [{"kind": "prune", "slices": {"w": {"0": "12"}}, "attributes": {}}]}', "Step 0"),
    ('{"format": 1, "steps": [{"kind": "prune", "slices": {}, "attributes": {"m": 3}}]}', "Step 0"),
    ('{"format": 1, "steps": [], "meta": []}', "meta"),
])
def test_faulty_plans_are_one_sentence(text, words):
    with pytest.raises(UserError, match=words) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_network_is_refused():
    plan = Plan([{"kind": "prune", "slices": {"5.weight": {"0": [0]}}, "attributes": {}}])
    with pytest.raises(UserError, match="5.weight"):
        apply_plan(nn.Sequential(nn.Linear(2, 2)), plan)
