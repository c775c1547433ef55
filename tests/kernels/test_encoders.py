"""Oracle: the dense nn.TransformerEncoderLayer, whose fused path reads the weights of its Linear layers without calling them."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from kernels import SparseLinear, formats, measure, sparsify, timing

from .masks import masked

PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()


@pytest.fixture(autouse=True)
def times(tmp_path, monkeypatch):
    """Sparse layers take half the time, and so do networks and encoder layers unless the list, (before, after) per measurement, says otherwise."""
    given: list[tuple[float, float]] = []
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "layer_times", lambda layer, offered, *rest: measure.Measured(
        {"dense": 100.0, **{label: 50.0 + number for number, label in enumerate(offered)}}))
    monkeypatch.setattr(timing, "on_cpu", lambda calls, *rest, **more: [
        timing.Timing(t, 1, 1, 5) for t in (given.pop(0) if given else (100.0, 50.0))])
    return given


def encoder_layer(sparsity: float = 0.9, **options) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **options}).eval()
    for linear in (layer.linear1, layer.linear2):
        linear.weight.data = masked(*linear.weight.shape, sparsity, "random", torch.Generator().manual_seed(0))
    return layer


def encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.TransformerEncoder(encoder_layer(**options), layers).eval()


@pytest.fixture
def counted(monkeypatch):
    """Numbers of weights decoded to dense and of sparse layers called."""
    count = {"decoded": 0, "called": 0}
    unpack, forward = formats.unpack, SparseLinear.forward

    def counting(key, function):
        def call(*args):
            count[key] += 1
            return function(*args)

        return call

    monkeypatch.setattr(formats, "unpack", counting("decoded", unpack))
    monkeypatch.setattr(SparseLinear, "forward", counting("called", forward))
    return count


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}, {"activation": nn.SiLU()}], ids=str)
def test_sparse_layers_are_called_and_not_decoded(options, counted):
    model, x = encoder(**options), torch.randn(3, 5, 32)
    sparse, report = sparsify(model, x)
    assert report.replaced == [f"layers.{n}.linear{m}" for n in (0, 1) for m in (1, 2)]
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for network in (sparse, copy.deepcopy(sparse), torch.load(file, weights_only=False)):
        counted |= {"decoded": 0, "called": 0}
        with torch.no_grad():
            torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
        assert counted == {"decoded": 0, "called": 4}
    assert model.layers[0].activation_relu_or_gelu == encoder(**options).layers[0].activation_relu_or_gelu


def test_masks_are_followed():
    model, x = encoder(), torch.randn(3, 5, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    sparse, report = sparsify(model, (x, causal))
    assert len(report.replaced) == 4
    with torch.no_grad():
        torch.testing.assert_close(sparse(x, causal), model(x, causal), rtol=1e-4, atol=1e-5)


def test_padded_batches_stay_nested(counted):
    """torch packs a padded batch into a nested tensor and fills the padding with zeros at the end."""
    model, x = encoder(), torch.randn(3, 5, 32)
    for example in ((x, None, PADDING), (x,)):
        sparse, report = sparsify(model, example)
        assert len(report.replaced) == 4
        counted["called"] = 0
        with torch.no_grad():
            y = sparse(x, src_key_padding_mask=PADDING)
            torch.testing.assert_close(y, model(x, src_key_padding_mask=PADDING), rtol=1e-4, atol=1e-5)
        assert counted["called"] >= 4 and y[PADDING].count_nonzero() == 0
    assert [c.shape for c in sparsify(model, (x, None, PADDING))[1].choices][0] == (10, 32)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_sparse_layer_takes_nested_tensors(layout):
    dense = encoder_layer().linear1
    sparse = SparseLinear.from_dense(dense)
    parts = [torch.randn(n, 32) for n in (3, 1, 4)]
    y = sparse(torch.nested.as_nested_tensor(parts, layout=layout))
    assert y.is_nested and y.layout == layout
    for own, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(own, dense(part))
    torch.cat([own.flatten() for own in y.unbind()]).sum().backward()
    sparse_grad = sparse.values.grad.clone()
    sparse.zero_grad()
    sparse(torch.cat(parts)).sum().backward()
    torch.testing.assert_close(sparse.values.grad, sparse_grad)


def test_a_network_on_nested_tensors():
    model = encoder_layer().linear1
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.as_nested_tensor([torch.randn(n, 32) for n in (3, 1, 4)], layout=layout)
        sparse, report = sparsify(model, x)
        assert report.replaced == [""] and report.choices[0].shape == (8, 32)
        y = sparse(x)
        torch.testing.assert_close((y + y).unbind(), (model(x) * 2).unbind())
        if layout == torch.jagged:
            assert (sparse(x) + model(x)).is_nested


def test_encoder_layers_with_other_modules_in_them_are_left_alone():
    class Other(nn.TransformerEncoderLayer):
        def __init__(self):
            super().__init__(32, 4, 64, batch_first=True)
            del self.linear1, self.linear2
            self.inner = encoder_layer().linear1

        def forward(self, x):
            return self.inner(x)

    model = Other().eval()
    sparse, report = sparsify(model, torch.randn(3, 32))
    assert report.replaced == ["inner"] and sparse.activation_relu_or_gelu == 1
    layer = encoder_layer(activation=nn.SiLU())
    layer.linear1 = nn.Sequential(layer.linear1)
    assert sparsify(layer, torch.randn(3, 5, 32))[1].replaced == ["linear1.0", "linear2"]


def test_an_encoder_layer_that_did_not_get_faster_stays_alone(times):
    """The fused path is lost with its layers; the rest of the network keeps what it won."""
    model, x = nn.Sequential(encoder_layer(), encoder_layer(), nn.Linear(32, 32)).eval(), torch.randn(3, 5, 32)
    model[2].weight.data = masked(32, 32, 0.9, "random", torch.Generator().manual_seed(0))
    times += [(100.0, 98.0), (100.0, 90.0), (100.0, 90.0)]
    lines = []
    sparse, report = sparsify(model, x, log=lines.append)
    assert report.replaced == ["1.linear1", "1.linear2", "2"]
    assert type(sparse[0].linear1) is nn.Linear and sparse[0].activation_relu_or_gelu == 1 and sparse[1].activation_relu_or_gelu == 0
    reasons = {c.layer: c.reason for c in report.choices}
    assert "the encoder layer 0 as a whole took 98 us with its sparse layers" in reasons["0.linear2"] and "100 us without" in reasons["0.linear2"]
    assert any(line.startswith("0.linear1: dense") and "as a whole" in line for line in lines)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_second_measurement_counts_too(times):
    times += [(100.0, 50.0), (100.0, 99.0)]
    sparse, report = sparsify(encoder_layer(), torch.randn(3, 5, 32))
    assert report.replaced == [] and type(sparse.linear1) is nn.Linear and "99 us" in report.choices[0].reason


def test_an_encoder_layer_that_computes_something_else_stays(monkeypatch):
    layer, x = encoder_layer(), torch.randn(3, 5, 32)
    monkeypatch.setattr(measure, "check", lambda *given: None)
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x, residual=None: x.new_full((*x.shape[:-1], self.rows), float("nan")))
    sparse, report = sparsify(layer, x)
    assert report.replaced == [] and "differs" in report.choices[0].reason
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x, residual=None: 1 / 0)
    assert "division by zero" in sparsify(layer, x)[1].choices[0].reason


def test_one_linear_in_two_encoder_layers(counted):
    model, x = nn.Sequential(encoder_layer(), encoder_layer()).eval(), torch.randn(3, 5, 32)
    model[1].linear1 = model[0].linear1
    sparse, report = sparsify(model, x)
    assert report.replaced == ["0.linear1", "0.linear2", "1.linear2"] and sparse[0].linear1 is sparse[1].linear1
    counted |= {"decoded": 0, "called": 0}
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
    assert counted == {"decoded": 0, "called": 4}


def test_a_training_encoder_trains_its_sparse_layers():
    model = encoder_layer().train()
    sparse, report = sparsify(model, torch.randn(3, 5, 32))
    assert len(report.replaced) == 2 and sparse.training
    sparse(torch.randn(3, 5, 32)).square().sum().backward()
    assert all(linear.values.grad.count_nonzero() > 0 for linear in (sparse.linear1, sparse.linear2))
