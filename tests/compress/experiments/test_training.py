"""Oracles: an uninterrupted training by `fit`, hand-computed statistics, and the definition of a phase."""

import itertools
import math

import pytest
import torch
from torch import nn

from compress.config import DataConfig, FinetuneConfig
from compress.data import load_data
from compress.experiments.summary import paired, summarise
from compress.experiments.training import mac_fraction, train_in_phases
from compress.masks import Masks
from compress.train import fit

DATA = load_data(DataConfig(name="digits", train_images=200), seed=0, device="cpu")
CFG = FinetuneConfig(lr=0.05, schedule="cosine", optimizer="sgd")


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def phases(masks, sparsities, steps, **options):
    return train_in_phases(
        masks, DATA, CFG, batch_size=32, eval_batch_size=500, seed=3, sparsities=sparsities, steps=steps, **options
    )  # fmt: skip


def test_phases_without_pruning_are_one_plain_training():
    model, plain = network(), network()
    masks = Masks.attach(model)
    records = phases(masks, [None, None, None], [4, 0, 6])
    fit(plain, DATA, CFG.model_copy(update={"epochs": 2}), batch_size=32, seed=3, steps=10)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert [(r["phase"], r["step"], r["steps"], r["sparsity"]) for r in records] == [(0, 0, 4, 0.0), (1, 4, 0, 0.0), (2, 4, 6, 0.0)]
    assert records[0]["accuracy"] == records[1]["accuracy_pruned"] == records[1]["accuracy"] == records[2]["accuracy_pruned"]


def test_prunes_happen_at_their_steps_and_nest():
    masks = Masks.attach(network())
    seen = []
    records = phases(masks, [0.3, 0.6, 0.9], [3, 3, 3], at_phase_end=lambda phase: seen.append(masks.snapshot()))
    total = masks.total
    for record, snapshot, sparsity in zip(records, seen, [0.3, 0.6, 0.9], strict=True):
        kept = sum(int(mask.sum()) for mask in snapshot.values())
        assert kept == math.ceil((1 - sparsity) * total - 1e-6) and record["sparsity"] == 1 - kept / total
        assert record["mac_steps"] == pytest.approx(3 * record["mac_fraction"])
    for first, second in itertools.pairwise(seen):
        assert all(bool((second[name] <= first[name]).all()) for name in first)
    assert all(bool((masks.parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert mac_fraction(masks, DATA.input_shape) == records[-1]["mac_fraction"]


def test_no_steps_only_prunes():
    model = network()
    masks = Masks.attach(model)
    weight = model[5].weight.detach().clone()
    records = phases(masks, [0.5], [0], every=True)
    assert records[0]["accuracy"] == records[0]["accuracy_pruned"]
    assert torch.equal(model[5].weight, weight * masks["5.weight"])


def test_statistics():
    rows = [
        {"arm": arm, "target": 0.5, "seed": seed, "accuracy": value}
        for arm, values in {"a": (0.5, 0.7, 0.9), "b": (0.4, 0.7, 0.7)}.items()
        for seed, value in enumerate(values)
    ]
    found = summarise(rows, "accuracy", ("arm",))
    assert found[0] == {"arm": "a", "n": 3, "mean": pytest.approx(0.7), "std": pytest.approx(0.2), "low": 0.5, "high": 0.9}
    gap = paired(rows, "accuracy", "a")[0]
    # Differences -0.1, 0, -0.2: mean -0.1, standard deviation 0.1, t(0.975, 2) = 4.302653.
    assert gap["difference"] == pytest.approx(-0.1)
    assert gap["interval"] == pytest.approx([-0.1 - 4.302653 * 0.1 / math.sqrt(3), -0.1 + 4.302653 * 0.1 / math.sqrt(3)], abs=1e-6)
    assert paired(rows[:1] + rows[3:4], "accuracy", "a")[0]["interval"] is None


def test_only_the_last_accuracy_when_asked():
    first, second = (phases(Masks.attach(network()), [0.3, 0.6], [2, 2], every=every) for every in (True, False))
    assert [(r["accuracy_pruned"], r["accuracy"]) for r in second] == [(None, None), (None, first[1]["accuracy"])]
