"""Oracle: plain loops over the weights; a training run must leave pruned weights and their momentum at zero."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import UserError
from compress.masks import Masks, prune, select_parameters
from models import build
from tests.compress.saliency.networks import Residual, chain, data


def small():
    return chain(torch.Generator().manual_seed(0), bias=True)


def test_scopes():
    model = small()
    conv = [name for name, p in model.named_parameters() if p.dim() == 4]
    linear = [name for name, p in model.named_parameters() if p.dim() == 2]
    gammas = [name for name, p in model.named_parameters() if p.dim() == 1 and name.endswith("weight")]
    assert select_parameters(model, "conv") == conv
    assert select_parameters(model, "conv+linear") == conv + linear
    assert sorted(select_parameters(model, "all-weights")) == sorted(conv + linear + gammas)
    assert select_parameters(model, "conv", exclude=["0"]) == conv[1:]
    assert select_parameters(model, "conv", biases=True)[:2] == ["0.weight", "0.bias"]
    assert len(select_parameters(model, "all-weights", biases=True)) == len(list(model.parameters()))
    assert select_parameters(nn.MultiheadAttention(4, 1), "conv+linear") == ["in_proj_weight", "out_proj.weight"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert select_parameters(tied, "conv+linear") == ["0.weight"]


def test_scales_on_skip_paths_are_masked_only_where_asked():
    """They are not trained, so that a mask is all that ever changes them."""
    model = build("resnet20", 10, width=0.25, skip_scale=True)
    scales = [name for name in dict(model.named_parameters()) if name.endswith("shortcut.weight")]
    assert len(scales) == 7
    for scope in ("conv", "conv+linear", "all-weights"):
        assert not set(scales) & set(select_parameters(model, scope))
        assert [name for name in select_parameters(model, scope, residual=True) if name in scales] == scales
    masks = Masks.attach(model, "conv+linear", residual=True)
    prune(masks, "synflow", 0.2, iterations=5, options={"input_shape": (3, 8, 8)})
    assert any(not bool(masks[name].all()) for name in scales)
    assert all(torch.equal(masks.parameter(name), masks[name].float()) for name in scales)
    assert not any(masks.parameter(name).requires_grad for name in scales)
    with pytest.raises(UserError, match="no scales on its skip paths"):
        select_parameters(build("resnet20", 10), "conv", residual=True)


def test_scope_errors():
    with pytest.raises(UserError, match="matches no parameter of Linear"):
        select_parameters(nn.Linear(2, 2), "conv")
    with pytest.raises(UserError, match="outside of exclude"):
        select_parameters(small(), "conv", exclude=["*"])
    with pytest.raises(UserError, match="did you mean 'conv\\+linear'"):
        select_parameters(small(), "conv+linaer")
    with pytest.raises(UserError, match="carries no masks"):
        Masks.of(small())


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_no_resurrection_and_masked_momentum(optimizer):
    generator = torch.Generator().manual_seed(1)
    model = small().train()
    build = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
        "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.01),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    }[optimizer](model.parameters())
    masks = Masks.attach(model, "conv+linear")

    def step():
        for x, y in data(generator, batches=3):
            build.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            build.step()
            masks.after_step(build)

    step()  # moments are non-zero before pruning
    prune(masks, "magnitude", 0.3)
    before = masks.snapshot()
    step()
    for name, mask in masks.items():
        parameter = masks.parameter(name)
        assert torch.equal(mask, before[name])
        assert bool((parameter[~mask] == 0).all()) and bool((parameter[mask] != 0).all())
        moments = [value for value in build.state[parameter].values() if torch.is_tensor(value) and value.shape == parameter.shape]
        assert moments and all(bool((value[~mask] == 0).all()) and bool(value[mask].any()) for value in moments)


def test_enforced_within_its_block_only():
    generator = torch.Generator().manual_seed(1)
    model, stranger = small().train(), nn.Linear(2, 2)
    masks = Masks.attach(model)
    prune(masks, "magnitude", 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    other = torch.optim.SGD(stranger.parameters(), 0.1)
    (x, y), *_ = data(generator)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        stranger(torch.ones(2)).sum().backward()
        other.step()

    with masks.enforced():
        step()
        step()
    for name, mask in masks.items():
        assert bool((masks.parameter(name)[~mask] == 0).all())
        assert bool((optimizer.state[masks.parameter(name)]["momentum_buffer"][~mask] == 0).all())
    step()
    assert any(bool((masks.parameter(name)[~mask] != 0).any()) for name, mask in masks.items())


def test_masks_are_buffers_and_survive_copies():
    model = small()
    masks = Masks.attach(model, "conv")
    prune(masks, "random", 0.5, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model)
    other = Masks.of(twin)
    assert other.names == masks.names and all(torch.equal(other[name], mask) for name, mask in masks.items())
    assert "0.weight_mask" in model.state_dict() and Masks.attach(model, "conv").kept == masks.kept
    twin.get_parameter("0.weight").data.fill_(1.0)
    masks.apply(twin)
    assert torch.equal(twin.get_parameter("0.weight") != 0, masks["0.weight"])


def test_permanent():
    model = small()
    x = data(torch.Generator().manual_seed(3))[0][0]
    masks = Masks.attach(model)
    prune(masks, "magnitude", 0.4)
    output, kept = model(x), masks.snapshot()
    keys = {key for key in model.state_dict() if key.endswith("_mask")}
    masks.make_permanent()
    assert keys and not any(key.endswith("_mask") for key in model.state_dict())
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in kept.items())
    assert torch.equal(model(x), output)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["magnitude", "snip", "grasp", "synflow", "random", "gradient_magnitude"]),
    st.integers(1, 4),
    st.floats(0.05, 1.0),
    st.booleans(),
)
def test_iterative_pruning_nests_and_counts(seed, criterion, iterations, density, residual):
    generator = torch.Generator().manual_seed(seed)
    model = Residual().double() if residual else chain(generator, bias=True)
    masks = Masks.attach(model)
    seen = [masks.snapshot()]
    history = prune(
        masks, criterion, density, iterations=iterations, allow_empty=True, batches=data(generator), generator=generator,
        observe=lambda index, scores, new: seen.append({name: mask.clone() for name, mask in new.items()}),
    )  # fmt: skip
    assert len(history) == iterations and history == sorted(history, reverse=True)
    for index, (old, new) in enumerate(zip(seen, seen[1:], strict=False)):
        assert all(bool((new[name] <= old[name]).all()) for name in new)
        assert sum(int(mask.sum()) for mask in new.values()) == -(-round(density ** ((index + 1) / iterations) * masks.total, 6) // 1)
    assert all(bool((masks.parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_failed_pruning_changes_nothing():
    model = small()
    masks = Masks.attach(model)
    state = copy.deepcopy(model.state_dict())
    for density in (0.0, 1e-4):
        with pytest.raises(UserError):
            prune(masks, "magnitude", density, iterations=3)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    with pytest.raises(UserError, match="needs a density"):
        prune(masks, "magnitude")
    with pytest.raises(UserError, match="at least 1"):
        prune(masks, "magnitude", 0.5, iterations=0)


def test_threshold_is_strict_and_invert_reverses():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.5, -0.25, 0.1, -2.0]])
    masks = Masks.attach(model)
    assert prune(masks, "threshold", options={"threshold": 0.25}) == [0.5]
    assert masks["weight"].tolist() == [[True, False, False, True]]
    other = nn.Linear(4, 1, bias=False)
    other.weight.data = torch.tensor([[0.5, -0.25, 0.1, -2.0]])
    masks = Masks.attach(other)
    prune(masks, "magnitude", 0.5, invert=True)
    assert masks["weight"].tolist() == [[False, True, True, False]]


def test_update_refuses_resurrection():
    masks = Masks.attach(nn.Linear(3, 1))
    masks.update({"weight": torch.tensor([[True, False, True]])})
    with pytest.raises(ValueError, match="bring pruned weights back"):
        masks.update({"weight": torch.tensor([[True, True, True]])})
    with pytest.raises(ValueError, match="has shape"):
        masks.update({"weight": torch.ones(3, dtype=torch.bool)})


def test_global_scope_of_all_weights_counts_normalisation_scales():
    masks = Masks.attach(small(), "all-weights")
    prune(masks, "magnitude", 0.1, allow_empty=True)
    assert masks.total == 3 * 6 * 9 + 6 * 8 * 9 + 8 * 8 * 9 + 32 + 22
    assert masks.kept == -(-masks.total // 10)
    assert sum(int(mask.sum()) for _, mask in masks.items()) == masks.kept
    assert masks.density == masks.kept / masks.total


def test_masks_changed_from_outside_are_enforced():
    # A checkpoint is loaded into the buffers, the network changes its type: the next step must see both.
    model = nn.Linear(3, 1, bias=False)
    masks = Masks.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.after_step(optimizer)
    model.load_state_dict({"weight": torch.ones(1, 3), "weight_mask": torch.tensor([[True, False, True]])})
    masks.after_step(optimizer)
    assert model.weight.tolist() == [[1.0, 0.0, 1.0]]
    model.double()
    model.weight.data.fill_(2.0)
    masks.after_step(optimizer)
    assert model.weight.tolist() == [[2.0, 0.0, 2.0]] and masks["weight"].dtype == torch.bool
