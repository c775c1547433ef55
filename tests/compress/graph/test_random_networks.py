"""Oracle: the masked original (tests/compress/graph/oracle.py), in float64, on 100 random networks; counts from the cut tensors."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress.graph import trace
from compress.plan import Plan, apply_plan
from tests.compress.graph.oracle import choose, distance, masked, outputs, randomise
from tests.compress.graph.random_nets import KINDS, RandomNet

SEEDS = range(100)


def build(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = randomise(RandomNet(seed), generator).double().eval()
    return model, torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator), generator


@pytest.mark.parametrize("seed", SEEDS)
def test_cut_network_equals_masked_original(seed):
    model, x, generator = build(seed)
    dense = outputs(model, x)
    graph = trace(model, torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    expected_reasons = ("output of the network", "only one channel", "padded by a fixed number")
    for group in graph.groups:
        assert group.prunable or group.reason.startswith(expected_reasons), "a rule failed its trial"
    removals = choose(graph, generator)
    assert removals
    keep = {group.name: torch.tensor(sorted(set(range(group.size)) - set(gone.tolist()))) for group, gone in removals.items()}
    predicted = graph.count(keep)
    expected = outputs(masked(model, removals), x)
    fresh = copy.deepcopy(model)
    step = graph.prune(model, removals, verify=False)
    got = outputs(model, x)
    assert distance(expected, got) <= 1e-10
    assert distance(dense, got) > 1e-6, "the cut changed nothing, so that the comparison shows nothing"
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    assert predicted == (sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
    replayed = apply_plan(fresh, Plan.from_json(Plan([step]).to_json()))
    assert distance(got, outputs(replayed, x)) == 0


def test_every_kind_of_block_is_drawn_and_pruned():
    """Each kind loses channels of a layer of its own in at least one network."""
    pruned = set()
    for seed in range(len(KINDS) * 2):
        model, x, _ = build(seed)
        kinds = {f"blocks.{position}": block.kind for position, block in enumerate(model.blocks)}
        for row in trace(model, x).coverage():
            if row.status != "pinned":
                pruned.update(kind for name, kind in kinds.items() if row.layer.startswith(f"{name}."))
    assert pruned == set(KINDS)
