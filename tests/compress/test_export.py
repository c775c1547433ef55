"""Oracle: the network itself in eager mode, at the example's batch size and at others; onnxruntime runs the ONNX file."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from compress import export
from compress.errors import RunError, UserError
from compress.export import save_exported, to_exported_program, to_onnx
from compress.graph import trace
from models import build


class Residual(nn.Module):
    """A small network with uneven widths, as surgery leaves them: convolution, BatchNorm, residual, dropout, linear."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 4))

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.block(x))


class Two(nn.Module):
    """Two inputs of one batch size and a constant third; two outputs."""

    def forward(self, a, b, scale):
        return {"sum": a + scale * b, "norm": (a * b).sum(1)}


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(4, -1)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.fixture
def net():
    """Running statistics are not the initial ones."""
    model = Residual()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8) * 2 + 1)
    return model


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("batch", [1, 4])
def test_program_equals_the_network_at_other_batch_sizes(net, batch):
    net.train()
    net.block.eval()
    flags = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    program = to_exported_program(net, torch.randn(batch, 1, 8, 8))
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    net.eval()
    for other in (1, 3, 7):
        x = torch.randn(other, 1, 8, 8)
        with torch.no_grad():
            assert difference(program.module()(x), net(x)) <= 1e-6


def test_saved_program_is_loaded_again(net, tmp_path):
    path = save_exported(net, torch.randn(2, 1, 8, 8), tmp_path / "sub" / "net.pt2")
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert difference(torch.export.load(str(path)).module()(x), net.eval()(x)) <= 1e-6
    assert [p.name for p in path.parent.iterdir()] == ["net.pt2"]


def test_several_inputs_share_the_batch_size():
    program = to_exported_program(Two(), (torch.randn(2, 3), torch.randn(2, 3), torch.tensor(2.0)))
    a, b = torch.randn(2, 6, 3)
    found = program.module()(a, b, torch.tensor(3.0))
    assert torch.equal(found["sum"], a + 3 * b) and torch.equal(found["norm"], (a * b).sum(1))


def test_fixed_batch_size_is_kept_where_asked(net):
    program = to_exported_program(FixedBatch(), torch.randn(4, 2, 3), dynamic_batch=False)
    x = torch.randn(4, 2, 3)
    assert torch.equal(program.module()(x), x.view(4, -1))


@pytest.mark.parametrize(
    "model, inputs, said",
    [
        (FixedBatch(), torch.randn(4, 2, 3), "FixedBatch with a free batch size"),
        (Branch(), torch.randn(4, 3), "cannot export Branch"),
        (Residual(), (), "nothing"),
        (Residual(), 3, "int"),
        (Residual(), torch.randn(0, 1, 8, 8), "n > 0"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(model, inputs, said):
    with pytest.raises(UserError) as caught:
        to_exported_program(model, inputs)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value) and said in str(caught.value)


def test_a_program_that_computes_something_else_is_refused(net, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_runtime", lambda path: lambda args: [net(*args) * 1.01])
    with pytest.raises(RunError, match=r"differs from the network by 0\.0[01]"):
        to_onnx(net, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "_runtime", lambda path: lambda args: [net(*args) * float("nan")])
    with pytest.raises(RunError, match="nan"):
        to_onnx(net, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx")


def test_onnx_runtime_equals_the_network(net, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    worst = to_onnx(net, torch.randn(1, 1, 8, 8), tmp_path / "net.onnx")
    assert 0 <= worst <= 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(9, 1, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_missing_packages_name_the_pip_command(net, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("onnx", "onnxruntime") else found(name, *rest))
    with pytest.raises(UserError, match=r"needs onnx, onnxruntime; install with: pip install .*\[export\]") as caught:
        to_onnx(net, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx")
    assert len(caught.value.faults) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.slow_ci
@pytest.mark.parametrize(
    "name, shape",
    [("resnet20", (1, 8, 8)), ("vgg16", (3, 32, 32)), ("torchvision/mobilenet_v2", (3, 64, 64)), ("torchvision/resnet18", (3, 64, 64))],
)
def test_pruned_networks_of_the_registry_in_onnxruntime(name, shape, tmp_path):
    pytest.importorskip("onnxruntime")
    model = build(name, 10, in_channels=shape[0]) if "/" not in name else build(name, 10)
    example = torch.randn(2, *shape)
    graph = trace(model, example)
    graph.prune(model, {group.name: torch.arange(0, group.size, 3) for group in graph.groups if group.prunable})
    assert to_onnx(model, example, tmp_path / "net.onnx") <= 1e-4
