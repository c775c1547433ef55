"""Oracle: the dense network's outputs, and the reasons that a layer's own state (hooks, tied or pruned weights, faults) must give."""

import json
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from kernels import SparseLinear, candidates, measure, precision, sparsify, timing
from kernels.candidates import Candidate
from kernels.table import layer_key

from .masks import masked


def half(rows: int = 32, columns: int = 32, sparsity: float = 0.9) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data = masked(rows, columns, sparsity, "random", torch.Generator().manual_seed(0))
    return layer


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    """Sparse forms take half the time."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "layer_times", lambda layer, offered, *rest: measure.Measured(
        {"dense": 100.0, **{label: 50.0 + number for number, label in enumerate(offered)}}))
    monkeypatch.setattr(timing, "on_cpu", lambda calls, *rest, **more: [timing.Timing(100.0, 1, 1, 5), timing.Timing(50.0, 1, 1, 5)])
    return tmp_path


def test_a_single_layer_is_a_network():
    layer, x = half(), torch.randn(3, 32)
    sparse, report = sparsify(layer, x)
    assert isinstance(sparse, SparseLinear) and report.replaced == [""] and "(the network itself): csr" in str(report)
    torch.testing.assert_close(sparse(x), layer(x))
    _, report = sparsify(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 4))
    assert "not measured, because no layer was replaced" in str(report) and "nan" not in str(report)


def test_a_network_pruned_by_torch():
    """torch.nn.utils.prune leaves weights with a history, which copy.deepcopy refuses; its hook is no reason to stay dense."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 2))
    prune.l1_unstructured(model[0], "weight", 0.9)
    prune.random_unstructured(model[2], "weight", 0.5)
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.l1_unstructured(model[2], "bias", 4)
    x = torch.randn(3, 32)
    expected = model(x)
    sparse, report = sparsify(model, x)
    assert report.replaced == ["0", "2"] and isinstance(sparse[2], SparseLinear)
    torch.testing.assert_close(sparse(x), expected)
    assert torch.equal(model(x), expected) and prune.is_pruned(model[0])
    model[3].weight_orig = model[0].weight_orig
    assert "tied" in sparsify(model, x)[1].choices[0].reason


def test_a_layer_with_hooks_stays():
    for attach in (lambda layer: layer.register_forward_hook(lambda *given: None),
                   lambda layer: layer.register_forward_pre_hook(lambda *given: None),
                   lambda layer: layer.register_full_backward_hook(lambda *given: None),
                   lambda layer: setattr(layer, "forward", layer.forward)):
        model = nn.Sequential(half(), half())
        attach(model[0])
        sparse, report = sparsify(model, torch.randn(2, 32))
        assert type(sparse[0]) is nn.Linear and report.replaced == ["1"] and "hooks" in report.choices[0].reason


def test_a_stored_decision_is_checked_before_it_is_used(fast, monkeypatch):
    class Doubles(SparseLinear):
        def forward(self, x, residual=None):
            return 2 * super().forward(x)

    model, x = nn.Sequential(half(), nn.ReLU()), torch.randn(2, 32)
    for build, reason in ((lambda: Doubles.from_dense(model[0], format="csr"), "differs from the dense layer by 1.0e+00"),
                          (lambda: Doubles.from_dense(model[0], format="nonsense"), "is not one of")):
        monkeypatch.setattr(candidates, "eligible", lambda layer, shape, build=build: [Candidate("csr torch", build)])
        table = fast / "table.json"
        table.write_text(json.dumps({layer_key(model[0], (2, 32), False, float((model[0].weight != 0).float().mean())):
                                     {"dense": 100.0, "csr torch": 1.0}}))
        sparse, report = sparsify(model, x, table=table)
        assert type(sparse[0]) is nn.Linear and report.replaced == []
        assert "csr torch, though faster, is not usable" in report.choices[0].reason and reason in report.choices[0].reason


def test_whatever_a_form_raises_is_named(monkeypatch):
    class OutOfResources(Exception):
        """As Triton's: no RuntimeError."""

    def fails():
        raise OutOfResources("out of resource: shared memory\nRequired: 1")

    monkeypatch.undo()
    layer = half().requires_grad_(False)
    offered = {"a": Candidate("a", fails), "b": Candidate("b", lambda: SparseLinear.from_dense(layer, format="csr"))}
    found = measure.layer_times(layer, offered, (2, 32), False, 0.01)
    assert found.faults == {"a": "out of resource: shared memory"} and "dense" in found.times
    monkeypatch.setattr(measure, "layer_times", lambda *given: found)
    monkeypatch.setattr(candidates, "eligible", lambda layer, shape: list(offered.values()))
    _, report = sparsify(layer, torch.randn(2, 32), remeasure=True)
    assert "not usable: a (out of resource: shared memory)" in report.choices[0].reason


def test_one_output_at_a_time(monkeypatch):
    """Beside the dense output no other is alive while a candidate runs, and none at all while all are timed."""
    monkeypatch.undo()
    outputs, alive = [], []

    class Counts(nn.Linear):
        def forward(self, x):
            alive.append(sum(y() is not None for y in outputs))
            y = super().forward(x)
            outputs.append(weakref.ref(y))
            return y

    layer = Counts(32, 32).requires_grad_(False)
    found = measure.layer_times(layer, {str(i): Candidate(str(i), lambda: layer) for i in range(3)}, (2, 32), False, 0.0)
    assert set(found.times) == {"dense", "0", "1", "2"}
    assert max(alive) == 1 and alive[-4:] == [0] * 4


def test_keys_tell_patterns_apart():
    """Masks of one density: shared by 128 rows, by 64, in 64 x 16 panels, random, and with all kept weights in a few rows."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(5, 128, 256, dtype=torch.bool)
    keep[0, :, :128] = True
    keep[1, :64, :128], keep[1, 64:, 128:] = True, True
    keep[2] = torch.rand(128, 256, generator=generator).argsort(1) < 128
    keep[3, :64] = True
    keep[4, :, ::2] = True
    layers = [nn.Linear(256, 128) for _ in keep]
    convolutions = [nn.Conv2d(256, 128, 1) for _ in keep]
    for mask, *pair in zip(keep, layers, convolutions):
        for layer in pair:
            layer.weight.data = mask.float().view_as(layer.weight)
    assert len({layer_key(layer, (1, 256), False, 0.5) for layer in layers[:4]}) == 4
    assert len({layer_key(layer, (1, 256, 4, 4), True, 0.5) for layer in convolutions}) == 5


def test_tf32_flags_are_read_from_either_set(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert precision.products_in_tf32()

    def refuses():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    assert not precision.products_in_tf32()
    assert precision.convolutions_in_tf32() == torch.backends.cudnn.allow_tf32


def test_a_rounded_float32_layer_is_compared_in_float64(monkeypatch):
    """A dense layer off by 3e-4, as TF32 makes it: the reference must be exact, so that an exact sparse form counts as right."""
    class Rounded(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if x.dtype == torch.float64 else y * (1 + 3e-4)

    class OnGpu(torch.Tensor):
        is_cuda = True

    layer = Rounded(16, 8).requires_grad_(False)
    x = torch.randn(40, 16).as_subclass(OnGpu)
    expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).as_subclass(torch.Tensor)
    reference = measure._reference(layer, x, layer(x)).as_subclass(torch.Tensor)
    assert measure._fault(reference, expected.float(), 1e-6) is None
    assert "3.0e-04" in measure._fault(layer(x).as_subclass(torch.Tensor), expected.float(), 1e-4)
