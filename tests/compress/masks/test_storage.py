"""Oracle: the network that was saved; file sizes against a dense safetensors file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import UserError
from compress.masks import Masks, load_masked, prune, save_masked
from tests.compress.saliency.networks import chain, data


def fresh(seed=0):
    return chain(torch.Generator().manual_seed(seed), bias=True, dtype=torch.float32)


@pytest.mark.parametrize("density", [1.0, 0.9, 0.3, 0.01])
def test_round_trip_and_size(tmp_path, density):
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    masks = Masks.attach(model)
    prune(masks, "magnitude", density)
    save_masked(masks, tmp_path / "m.safetensors")
    save_file(
        {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("_mask")}, tmp_path / "dense.safetensors"
    )
    other = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    loaded = load_masked(other, tmp_path / "m.safetensors")
    assert loaded.scope == "conv+linear" and loaded.names == masks.names
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    dense, masked = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "m"))
    assert masked < dense + 1000 if density == 1 else masked < dense * (density + 1 / 32) + 4000
    assert density == 1 or masked < dense


def test_kept_zero_stays_kept_and_outputs_agree(tmp_path):
    model = fresh()
    masks = Masks.attach(model)
    prune(masks, "random", 0.5, generator=torch.Generator().manual_seed(1))
    index = masks["0.weight"].nonzero()[0]
    model.get_parameter("0.weight").data[tuple(index)] = 0.0
    save_masked(masks, tmp_path / "m.safetensors")
    other = fresh(7)
    loaded = load_masked(other, tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    x = data(torch.Generator().manual_seed(2), dtype=torch.float32)[0][0]
    assert torch.equal(model(x), other(x))
    assert not list(tmp_path.glob("*.part"))


def test_bad_files(tmp_path):
    model = fresh()
    masks = Masks.attach(model)
    path = tmp_path / "m.safetensors"
    save_masked(masks, path)
    with pytest.raises(UserError, match="does not exist"):
        load_masked(fresh(), tmp_path / "none.safetensors")
    content = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_masked(fresh(), tmp_path / "cut.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no masked network"):
        load_masked(fresh(), tmp_path / "foreign.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 7, 3))
    state = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match="does not fit Sequential: for '0.weight' of shape \\(7, 3, 3, 3\\)"):
        load_masked(other, path)
    with pytest.raises(UserError, match="which the network lacks"):
        load_masked(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), path)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
