"""Oracle: the masked original (tests/compress/graph/oracle.py); only the classifier may stay in the families that must be pruned."""

import math

import pytest
import torch
import torchvision
from torch import nn

from compress.graph import trace
from tests.compress.graph.oracle import distance, masked, outputs

CONVOLUTIONAL = ("alexnet", "densenet", "efficientnet", "googlenet", "inception", "mnasnet", "mobilenet", "regnet", "resnet", "resnext",
                 "squeezenet", "vgg", "wide_resnet")
QUICK = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
ZOO = torchvision.models.list_models(module=torchvision.models)


def fill(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights and statistics of a size that keeps activations near one; much faster than the builders' own."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                if tensor.dim() > 1:
                    tensor.normal_(0, 1 / math.sqrt(max(1, tensor[0].numel())), generator=generator)
                elif name.endswith(("running_var", "weight")):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                else:
                    tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


def build(name: str, generator: torch.Generator) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith(("regnet", "swin", "maxvit")):  # their constructors compute with real numbers
        return fill(torchvision.models.get_model(name, weights=None, **options), generator)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
        if name.startswith("vgg"):
            model.classifier = nn.Sequential(nn.Linear(25088, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return fill(model.to_empty(device="cpu"), generator)


def check(name: str, side: int) -> None:
    """Half of every group goes, those with the smallest L2 norm over their producers first."""
    generator = torch.Generator().manual_seed(0)
    model = build(name, generator)
    x = torch.randn(1, 3, side, side, generator=generator)
    graph = trace(model, x)
    if name.startswith(CONVOLUTIONAL):
        rows = graph.coverage()
        assert [row.layer for row in rows if row.status == "pinned"] == [rows[-1].layer]
    parameters, removals = dict(model.named_parameters()), {}
    for group in graph.groups:
        if group.prunable:
            producers = [m for m in group.members if m.role == "out"]
            rows = [parameters[m.parameter].detach().movedim(m.dim, 0).flatten(1).square().sum(1)[m.indices] for m in producers]
            squares = sum(row.sum(1) for row in rows)
            removals[group] = squares.argsort()[:group.size // 2]
    assert removals
    dense, reference = outputs(model, x), masked(model, removals)
    expected = outputs(reference, x)
    graph.prune(model, removals, verify=False)
    got = outputs(model, x)
    assert distance(dense, got) > 1e-4
    if distance(expected, got) > 1e-5:  # very deep random networks amplify float32 rounding
        assert distance(outputs(reference.double(), x.double()), outputs(model.double(), x.double())) <= 1e-10
    left = {group.name: torch.arange(group.size - len(gone)) for group, gone in removals.items()}
    assert graph.count(left)[0] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_family_is_pruned_exactly(name):
    check(name, 64)


def test_vgg_is_pruned_exactly():
    check("vgg11_bn", 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_zoo_without_configuration(name):
    """Every classifier of torchvision: pruned exactly, or pinned where a rule is missing, never broken."""
    if name in ("vit_h_14", "regnet_y_128gf"):
        pytest.skip("more than 600 million parameters")
    side = 299 if "inception" in name else 224 if name.startswith(("alexnet", "squeezenet", "vit", "maxvit", "vgg")) else 128
    check(name, side)


def test_auxiliary_heads_follow_into_training():
    """GoogLeNet's auxiliary heads run in training only; their inputs are cut with the trunk, and training goes on."""
    with torch.device("meta"):
        model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=7)
    model = fill(model.to_empty(device="cpu"), torch.Generator().manual_seed(0))
    graph = trace(model, torch.zeros(1, 3, 64, 64))
    graph.prune(model, {group: range(group.size // 2) for group in graph.groups if group.prunable}, verify=False)
    assert model.aux1.conv.conv.weight.shape[:2] == (64, 256)
    assert [tuple(out.shape) for out in model.train()(torch.zeros(2, 3, 224, 224))] == [(2, 7)] * 3
