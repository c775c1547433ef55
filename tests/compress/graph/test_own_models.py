"""Oracle: the masked original (tests/compress/graph/oracle.py) in float64; counts from the materialised network."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress.graph import trace
from compress.graph.copies import real_copy
from compress.siblings import own
from tests.compress.graph.oracle import choose, distance, masked, outputs, randomise

MODELS = own("models")
QUICK = ["resnet20", "vgg11", "vgg11_plain", "preresnet110", "dpn26", "resnet18", "fc", "conv", "wrn_16_8"]
# Left out: as resnet110, but eleven times as deep; and depths of the same family.
ALIKE = ["resnet1202", *(name for name in MODELS.names() if "_fc3" in name and name != "vgg11_fc3")]
LONG = [name for name in MODELS.names() if not name.startswith("torchvision/") and name not in QUICK + ALIKE]


def check(name, **options):
    """Half of every group goes; returns the graph of the network before."""
    generator = torch.Generator().manual_seed(0)
    info = MODELS.info(name)
    side = info.exact_size or max(8, info.min_size)
    model = real_copy(randomise(MODELS.build(name, 10, **options), generator), torch.float64)
    x = torch.randn(1, 3, side, side, dtype=torch.float64, generator=generator)
    graph = trace(model, x)
    rows = graph.coverage()
    assert [row.layer for row in rows if row.status == "pinned"] == [rows[-1].layer], "only the classifier stays"
    removals = choose(graph, generator)
    predicted = graph.count({g.name: torch.tensor(sorted(set(range(g.size)) - set(gone.tolist()))) for g, gone in removals.items()})
    dense, expected = outputs(model, x), outputs(masked(model, removals), x)
    graph.prune(model, removals, verify=False)
    got = outputs(model, x)
    assert distance(expected, got) <= 1e-10
    assert distance(dense, got) > 1e-6
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert predicted == (sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
    return graph


@pytest.mark.parametrize("name", QUICK)
def test_network_is_pruned_exactly(name):
    check(name)


def test_convolution_shortcuts():
    check("resnet20", shortcut="conv")


@pytest.mark.slow_ci
@pytest.mark.parametrize("name", LONG)
def test_further_network_is_pruned_exactly(name):
    check(name)


def test_padded_shortcuts_couple_the_stages():
    """Option A: 16 channels run through all three stages (in the middle of 32, and of 64), 16 begin in the second and 32 in the third."""
    graph = trace(MODELS.build("resnet20", 10), torch.zeros(1, 3, 8, 8))
    sizes = {group.name: group.size for group in graph.groups if group.prunable and len([m for m in group.members if m.role == "out"]) > 1}
    assert sizes == {"conv1.weight": 16, "layer2.0.conv2.weight": 16, "layer3.0.conv2.weight": 32}
    wide = {m.parameter: m for m in graph.groups[0].members}["linear.weight"]
    assert wide.dim == 1 and wide.role == "in" and wide.indices.flatten().tolist() == list(range(24, 40))


def test_padding_attributes_follow():
    """Zero channels that go are taken from the module's own counts."""
    model = MODELS.build("resnet20", 10)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    graph.prune(model, {"conv1.weight": range(4), "layer2.0.conv2.weight": [0, 1, 2, 15]})
    shortcut = model.layer2[0].shortcut
    assert (shortcut.front, shortcut.back) == (5, 7)
