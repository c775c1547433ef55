"""Oracles: the state dictionary that was packed, and the size of the file that it is worth."""

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.errors import UserError
from compress.masks import Masks, prune
from compress.masks.packing import packed, unpacked
from compress.network_file import read_weights, weights_to_bytes
from models import build


def network(density=0.1):
    torch.manual_seed(0)
    model = build("resnet20", 10, width=0.5, skip_scale=True)
    masks = Masks.attach(model, "all-weights", biases=True, residual=True)
    prune(masks, "magnitude", density, allow_empty=True)
    return model


@pytest.mark.parametrize("density", [0.0001, 0.1, 1.0])
def test_round_trip(density):
    state = network(density).state_dict()
    small = packed(state)
    shapes = {name: value.shape for name, value in state.items()}
    assert not any(name.endswith("_mask") for name in small)
    back = unpacked(small, shapes, "it")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


def test_a_parameter_that_is_not_zero_where_it_is_pruned_keeps_its_values():
    model = nn.Linear(3, 2)
    Masks.attach(model)
    model.weight_mask[0, 0] = False
    assert packed(model.state_dict()).keys() == model.state_dict().keys()


def test_saved_networks_are_smaller_than_dense_ones(tmp_path):
    dense, images, labels = build("resnet20", 10, width=0.5), torch.randn(8, 3, 8, 8), torch.arange(8)
    masked, plan, _ = compress(dense, images[:1], [(images, labels)], method="mask_magnitude", budget={"weights": 0.9})
    save(masked, plan, tmp_path)
    weights, whole = sum(p.numel() for p in dense.parameters() if p.dim() > 1), len(weights_to_bytes(dense))
    size = (tmp_path / "model.safetensors").stat().st_size
    # 32 bits a weight become 1 bit and a tenth of 32; names and sizes of the further tensors take a few kilobytes.
    assert whole - weights * 4 * (1 - 0.1 - 1 / 32) <= size <= whole - weights * 4 * (1 - 0.1 - 1 / 32) + 8192
    again = load(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in masked.state_dict().items())


def test_masks_of_another_network_are_refused():
    content = weights_to_bytes(network())
    other = build("resnet20", 10, width=0.25, skip_scale=True)
    Masks.attach(other, "all-weights", biases=True, residual=True)
    with pytest.raises(UserError, match="the mask of '.*' does not belong to a tensor of shape"):
        read_weights(other, content, "the file")
