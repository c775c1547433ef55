"""Oracles: path enumeration in small networks, brute-force removal of single weights, and closed MAC counts."""

import itertools

import pytest
import torch
from torch import nn

from compress.effective import effective_masks, layer_macs, mask_columns, report
from compress.masks import Masks, prune
from tests.compress.saliency.networks import Residual, chain


def brute_force(model, masks, shape):
    """A weight is effective iff its removal changes the output of the network in random positive weights (no cancellation)."""
    generator = torch.Generator().manual_seed(9)
    values = {name: torch.rand(mask.shape, generator=generator, dtype=torch.float64) + 0.5 for name, mask in masks.items()}

    def output(changed):
        state = {name: value * changed[name] for name, value in values.items()}
        state |= {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.endswith("bias")}
        return torch.func.functional_call(model, state, (torch.ones(1, *shape, dtype=torch.float64),))

    whole, found = output(masks), {}
    for name, mask in masks.items():
        found[name] = torch.zeros_like(mask)
        for index in mask.nonzero():
            without = dict(masks)
            without[name] = mask.clone()
            without[name][tuple(index)] = False
            found[name][tuple(index)] = bool((output(without) != whole).any())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_against_removal_of_single_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    masks = {name: torch.rand(p.shape, generator=generator) < 0.1 for name, p in model.named_parameters() if p.dim() > 1}
    found, expected = effective_masks(model, masks, (2, 5, 5)), brute_force(model, masks, (2, 5, 5))
    assert all(torch.equal(found[name], expected[name]) for name in masks)
    assert any(int(found[name].sum()) < int(masks[name].sum()) for name in masks)


@pytest.mark.parametrize("seed", range(3))
def test_residual_against_removal(seed):
    generator = torch.Generator().manual_seed(seed)
    model = Residual().double()
    masks = {name: torch.rand(p.shape, generator=generator) < 0.1 for name, p in model.named_parameters() if p.dim() > 1}
    found, expected = effective_masks(model, masks, (3, 8, 8)), brute_force(model, masks, (3, 8, 8))
    assert all(torch.equal(found[name], expected[name]) for name in masks)


def test_paths_of_a_perceptron():
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    masks = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters() if p.dim() > 1}
    a, b, c = masks.values()
    expected = [torch.zeros_like(mask) for mask in (a, b, c)]
    for i, j, k, o in itertools.product(range(4), range(5), range(5), range(2)):
        if a[j, i] and b[k, j] and c[o, k]:
            expected[0][j, i] = expected[1][k, j] = expected[2][o, k] = True
    found = effective_masks(model, masks, (4,))
    assert all(torch.equal(x, y) for x, y in zip(found.values(), expected, strict=True))


def test_dense_networks_are_effective_and_max_pooling_blocks_nothing():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.AdaptiveMaxPool2d(1)
    )
    masks = Masks.attach(model, "all-weights")
    assert all(bool(mask.all()) for mask in effective_masks(model, dict(masks.items()), (3, 2, 2)).values())


def test_report_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(6 * 16, 10)
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masks = Masks.attach(model, "conv")
    first = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    first[1] = False
    second = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    second[:, 2] = False
    second[5] = False
    masks.update({"0.weight": first, "2.weight": second})
    found = report(masks, (3, 8, 8))
    # Channel 1 has no input, channel 2 no output, channel 5 of the second layer no input; the linear layer has no mask.
    assert [layer.dead_channels for layer in found.layers] == [2, 1]
    assert [layer.effective for layer in found.layers] == [2 * 27, 5 * 2 * 9]
    assert (found.weights, found.kept, found.effective) == (108 + 216, 81 + 5 * 3 * 9, 54 + 90)
    macs = layer_macs(model, (3, 8, 8))
    assert macs == {"0.weight": 64 * 108, "2.weight": 16 * 216, "4.weight": 960}
    assert found.macs == sum(macs.values())
    assert found.macs_nonzero == pytest.approx(64 * 81 + 16 * 135 + 960)
    plain = found.to_dict()
    assert plain["compression_ratio"] == 324 / 216 and plain["effective_compression_ratio"] == 324 / 144
    assert plain["layer_mean_sparsity"] == pytest.approx(1 - (81 / 108 + 135 / 216) / 2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name.endswith("bias"))


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_is_effective_where_its_unit_is(seed):
    """A unit lies on a path iff its row of effective weights holds one; masks of biases change nothing about weights or dead channels."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 3)
    )
    masks = Masks.attach(model, "all-weights", biases=True)
    generator = torch.Generator().manual_seed(seed)
    masks.update({name: torch.rand(mask.shape, generator=generator) < (0.12 if mask.dim() > 1 else 0.7) for name, mask in masks.items()})
    found = effective_masks(model, dict(masks.items()), (2, 5, 5))
    weights = {name: mask for name, mask in masks.items() if not name.endswith("bias")}
    alone = effective_masks(model, weights, (2, 5, 5))
    assert all(torch.equal(found[name], alone[name]) for name in weights)
    for layer, source in (("0", "0"), ("1", "0"), ("3", "3"), ("7", "7")):
        alive = found[f"{source}.weight"].flatten(1).any(1)
        assert torch.equal(found[f"{layer}.bias"], masks[f"{layer}.bias"] & alive), layer
    counted = report(masks, (2, 5, 5))
    assert counted.dead_channels == sum(int((~found[f"{layer}.weight"].flatten(1).any(1)).sum()) for layer in "037")
    assert any(int(found[name].sum()) < int(masks[name].sum()) for name in found if name.endswith("bias"))


def test_empty_layer_cuts_everything():
    model = chain(torch.Generator().manual_seed(0))
    masks = Masks.attach(model)
    masks.update({masks.names[1]: torch.zeros_like(masks[masks.names[1]])})
    found = report(masks, (3, 8, 8))
    assert found.empty_layers == [masks.names[1]] and found.effective == 0
    assert found.to_dict()["effective_compression_ratio"] is None
    assert found.dead_channels == sum(layer.channels for layer in found.layers)


def test_synflow_leaves_hardly_any_ineffective_weight():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for criterion in ("synflow", "random"):
        copy = chain(torch.Generator().manual_seed(2))
        masks = Masks.attach(copy)
        prune(
            masks,
            criterion,
            0.05,
            iterations=50,
            allow_empty=True,
            generator=generator,
            options={"input_shape": (3, 8, 8)} if criterion == "synflow" else {},
        )
        found[criterion] = report(masks, (3, 8, 8))
    assert found["synflow"].kept == found["random"].kept
    assert found["synflow"].effective == found["synflow"].kept > found["random"].effective


def test_columns_for_results():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 3))
    assert mask_columns(model, torch.zeros(5, 3, 4, 4)) == {}
    masks = Masks.attach(model, "conv")
    masks.update({"0.weight": torch.tensor([True, False, False, False, False, False]).reshape(2, 3, 1, 1)})
    expected = {"density": 1 / 6, "macs_nonzero": 16 + 96, "effective_density": 1 / 6, "empty_layers": 0, "dead_channels": 1}
    assert mask_columns(model, torch.zeros(5, 3, 4, 4)) == expected
    assert mask_columns(model, (torch.zeros(5, 3, 4, 4),)) == {"density": 1 / 6}
