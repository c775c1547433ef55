"""Oracle: which factors the options say are trained, round after round and through a stored network."""

import json

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.decompose import factorize
from compress.decompose.budget import eigendamage_round
from compress.decompose.rounds import EigenDamageOptions
from compress.errors import UserError
from compress.network_file import NETWORK
from tests.compress.decompose.nets import batches, network

X = torch.cat([x for x, _ in batches()])
OPTIONS = EigenDamageOptions(fisher="exact", ekfac=False, pool_fraction=0.4, cap=0.5)
FIXED = OPTIONS.model_copy(update={"fix_rotation": True})


def flags(module):
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def test_only_the_outer_factors_stay_fixed_in_every_round():
    net = network()
    for _ in range(2):
        before = net.b
        assert "b" in eigendamage_round(net, batches(), FIXED) and net.b is not before
        assert flags(net.b) == {"input.weight": False, "core.weight": True, "output.weight": False, "output.bias": True}


def test_rotations_are_trained_again_where_a_later_round_does_not_fix_them():
    net = network()
    eigendamage_round(net, batches(), FIXED)
    eigendamage_round(net, batches(), OPTIONS)
    assert all(flags(net.b).values())


@pytest.mark.parametrize("options", [OPTIONS, FIXED])
def test_a_frozen_layer_stays_frozen(options):
    net = network()
    net.b.weight.requires_grad_(False)
    for _ in range(2):
        eigendamage_round(net, batches(), options)
        assert flags(net.b) == {"input.weight": False, "core.weight": False, "output.weight": False, "output.bias": True}


def test_a_new_factor_is_trained_as_the_factor_of_its_name_else_as_the_core():
    block = factorize(nn.Conv2d(8, 8, 3), "tucker2", (4, 4))
    block.input.weight.requires_grad_(False)
    again = factorize(block, "tucker2", (2, 2))
    assert flags(again) == {"input.weight": False, "core.weight": True, "output.weight": True, "output.bias": True}
    two = factorize(nn.Conv2d(8, 8, 3), "svd", 2)
    two.core.weight.requires_grad_(False)
    assert flags(factorize(two, "tucker2", (2, 2), only_if_smaller=False)) == {
        "input.weight": False, "core.weight": False, "output.weight": True, "output.bias": True}


def stored(tmp_path):
    small, plan, _ = compress(network(), X[:1], batches(), method="eigendamage", budget={"params": 0.4}, recalibrate=False, options={"fix_rotation": True})
    small.norm.weight.requires_grad_(False)
    save(small, plan, tmp_path)
    return small


def test_a_stored_network_keeps_what_is_trained(tmp_path):
    small = stored(tmp_path)
    fresh = network()
    fresh.norm.bias.requires_grad_(False)
    loaded = load(tmp_path, fresh)
    assert flags(loaded) == flags(small)
    assert not loaded.norm.weight.requires_grad and loaded.norm.bias.requires_grad
    assert sum(not trained for trained in flags(loaded).values()) >= 3


def test_a_network_stored_without_these_flags_is_still_read(tmp_path):
    stored(tmp_path)
    description = json.loads((tmp_path / NETWORK).read_text())
    del description["frozen"]
    (tmp_path / NETWORK).write_text(json.dumps(description))
    assert all(flags(load(tmp_path, network())).values())


def test_flags_of_another_network_are_refused_in_one_sentence(tmp_path):
    stored(tmp_path)
    description = json.loads((tmp_path / NETWORK).read_text())
    for frozen, words in ((["b.other"], "'b.other'"), (3, "3"), ([["b"]], "['b']")):
        (tmp_path / NETWORK).write_text(json.dumps(description | {"frozen": frozen}))
        with pytest.raises(UserError) as error:
            load(tmp_path, network())
        assert words in str(error.value) and "\n" not in str(error.value)
