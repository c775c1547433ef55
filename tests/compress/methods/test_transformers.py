"""Oracle: the same encoder with the product of every block's factors as a dense weight, run by torch's own (fused) path."""

import copy

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.decompose.modules import FactorizedLinear, dense_weight

NAMES = ["svd", "tucker", "kfac_svd", "kfac_tucker", "eigendamage", "improved_eigendamage"]


class Classifier(nn.Module):
    """Two encoder layers over [n, 6, 16], mean over the positions, a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 48, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classifier().eval()


X = torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(1))
BATCHES = [(X, torch.arange(24) % 5)]


def dense_twin(small, model):
    """The original network with the weights of `small`, blocks multiplied out."""
    twin = copy.deepcopy(model)
    for name, module in small.named_modules():
        if isinstance(module, FactorizedLinear):
            with torch.no_grad():
                twin.get_submodule(name).weight.copy_(dense_weight(module))
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_a_factorized_encoder_computes_its_product_in_both_modes(model, name):
    # three factors of a matrix save nothing before a side has lost more than half
    options = {"cap": 0.95} if name == "improved_eigendamage" else {}
    small, _, report = compress(model, X[:1], BATCHES, method=name, budget={"params": 0.25}, options=options)
    assert any(".linear" in layer for layer in report.ranks) and 0.24 <= report.params_removed <= 0.35
    twin = dense_twin(small, model)
    with torch.no_grad():
        torch.testing.assert_close(small(X), twin(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.train()(X), twin.train()(X), rtol=1e-4, atol=1e-5)
    small(X).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_padding_masks_agree_where_there_is_no_padding(model):
    small, _, _ = compress(model, X[:1], method="svd", budget={"params": 0.25})
    twin, padding = dense_twin(small, model), torch.zeros(24, 6, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        ours, theirs = (network.encoder(X, src_key_padding_mask=padding) for network in (small, twin))
    torch.testing.assert_close(ours[:, :4], theirs[:, :4], rtol=1e-4, atol=1e-5)


def test_a_stored_encoder_is_rebuilt_with_equal_outputs(model, tmp_path):
    small, plan, _ = compress(model, X[:1], method="svd", budget={"params": 0.25})
    save(small, plan, tmp_path)
    rebuilt = load(tmp_path, Classifier()).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(X), small(X))


@pytest.mark.parametrize("name", ["svd", "eigendamage"])
def test_projections_that_are_never_called_are_left_with_a_reason(model, name):
    small, plan, report = compress(model, X[:1], BATCHES, method=name, budget={"params": 0.2})
    kept = {layer for layer, reason in report.pinned.items() if "never calls it" in reason}
    assert kept == {f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)} and plan.meta["skipped"] == report.pinned
    assert torch.equal(small.encoder.layers[0].self_attn.out_proj.weight, model.encoder.layers[0].self_attn.out_proj.weight)


@pytest.mark.parametrize("name", ["tucker", "kfac_tucker", "eigendamage", "improved_eigendamage"])
def test_grouped_convolutions_stay_with_a_reason(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
                        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    batches = [(torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 4)]
    small, _, report = compress(net, batches[0][0][:1], batches, method=name, budget={"params": 0.2})
    assert "groups" in report.pinned["2"] and torch.equal(small[2].weight, net[2].weight)
    assert "4" in report.ranks and f"kept 2: {report.pinned['2']}" in str(report)
