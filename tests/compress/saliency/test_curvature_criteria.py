"""Oracles: loops over single examples, the dense Fisher matrix of a linear model, and the rank-one recursion of the paper."""

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.masks import Masks, prune
from compress.saliency import score_weights
from compress.saliency.per_example import example_gradients
from tests.compress.saliency.networks import chain, data


def looped(model, names, batches):
    rows = {name: [] for name in names}
    for x, y in batches:
        for i in range(len(y)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            for name, grad in zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True):
                rows[name].append(grad.flatten())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def setup(seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    model = chain(generator, bias=bias)
    return model, [name for name, p in model.named_parameters() if p.dim() > 1], data(generator, n=7, batches=2)


def test_example_gradients_against_loop():
    model, names, batches = setup()
    expected = looped(model, names, batches)
    chunks = list(example_gradients(model, names, batches, nn.functional.cross_entropy, chunk=3))
    assert [count for _, count in chunks] == [3, 3, 1, 3, 3, 1]
    for name in names:
        found = torch.cat([grads[name].flatten(1) for grads, _ in chunks])
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


def test_obd():
    model, names, batches = setup(1)
    expected, scores = looped(model, names, batches), score_weights(model, names, "obd", batches=batches)
    for name in names:
        weight = model.get_parameter(name).detach().flatten()
        torch.testing.assert_close(scores[name].flatten(), weight**2 * expected[name].square().mean(0) / 2, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_woodfisher_against_recursion(block):
    model, names, batches = setup(2)
    expected = looped(model, names, batches)
    scores = score_weights(model, names, "woodfisher", batches=batches, block=block, damping=1e-3)
    name = names[0]
    grads, weight = expected[name], model.get_parameter(name).detach().flatten()
    found = scores[name].flatten()
    for first in range(0, len(weight), block):
        part = grads[:, first : first + block]
        inverse = torch.eye(part.shape[1], dtype=torch.float64) / 1e-3
        for g in part:
            product = inverse @ g
            inverse -= torch.outer(product, product) / (len(part) + g @ product)
        oracle = weight[first : first + block] ** 2 / (2 * inverse.diagonal())
        torch.testing.assert_close(found[first : first + block], oracle, rtol=1e-7, atol=1e-15)


def test_woodfisher_with_single_weights_is_damped_obd():
    model, names, batches = setup(3)
    obd = score_weights(model, names, "obd", batches=batches)
    wood = score_weights(model, names, "woodfisher", batches=batches, block=1, damping=1e-2)
    for name in names:
        weight = model.get_parameter(name).detach()
        torch.testing.assert_close(wood[name], obd[name] + 1e-2 * weight**2 / 2, rtol=1e-9, atol=1e-15)


def test_woodfisher_ignores_pruned_weights():
    model, names, batches = setup(4, bias=False)
    masks = Masks.attach(model)
    prune(masks, "magnitude", 0.5)
    name = names[1]
    scores = score_weights(model, names, "woodfisher", batches=batches, block=10**6, damping=1e-2)[name]
    kept = masks[name].flatten()
    grads = looped(model, names, batches)[name][:, kept]
    inverse = torch.linalg.inv(grads.T @ grads / len(grads) + 1e-2 * torch.eye(int(kept.sum()), dtype=torch.float64))
    weight = model.get_parameter(name).detach().flatten()[kept]
    torch.testing.assert_close(scores.flatten()[kept], weight**2 / (2 * inverse.diagonal()), rtol=1e-8, atol=1e-15)
    with pytest.raises(UserError, match="damping > 0"):
        score_weights(model, names, "woodfisher", batches=batches, damping=0.0)
