"""Oracle: one-sentence errors for states of another layer, and the source layer's numbers where a state belongs; fresh processes."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from kernels import SparseConv2d, SparseLinear

from .subprocesses import ROOT
from .test_modules import CONV, LINEAR, conv, linear


def message(layer: nn.Module, state: dict) -> str:
    """The error of loading `state`, without torch's first line."""
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    return lines[1].strip()


def packed_conv(name: str, kernel: tuple[int, int], channels: int = 16) -> SparseConv2d:
    return SparseConv2d.from_dense(nn.Conv2d(channels, 8, kernel, padding=(kernel[0] // 2, kernel[1] // 2)), format=name)


@pytest.mark.parametrize("name", CONV)
def test_a_kernel_of_another_shape_is_refused(name):
    tall, flat = packed_conv(name, (3, 1)), packed_conv(name, (1, 3))
    assert message(flat, tall.state_dict()) == "layout holds a convolution of 3 x 1, but the kernel of this layer is 1 x 3"
    assert message(packed_conv(name, (3, 3), 1), packed_conv(name, (1, 1), 9).state_dict()).startswith("layout holds a convolution of 1 x 1")
    matrix = SparseLinear.from_dense(nn.Linear(48, 8), format=name)
    assert message(matrix, tall.state_dict()) == "layout holds a convolution of 3 x 1, but this layer multiplies by a matrix"
    again = packed_conv(name, (3, 1))
    again.load_state_dict(tall.state_dict())
    assert torch.equal(again.weight, tall.weight)


def test_kernels_of_states_without_a_kernel():
    """Before the kernel was stored, only sparse_conv told it."""
    for name in CONV:
        source, target = packed_conv(name, (3, 1)), packed_conv(name, (3, 1))
        state = source.state_dict()
        state["layout"] = state["layout"][:-2]
        target.load_state_dict(state)
        assert torch.equal(target.weight, source.weight) and torch.equal(target.layout, source.layout)
    assert message(packed_conv("csr", (1, 3)), state) == "layout holds a convolution of 3 x 1, but the kernel of this layer is 1 x 3"


def test_states_of_linear_and_convolution():
    matrix = SparseLinear.from_dense(nn.Linear(48, 8), format="run16")
    assert message(packed_conv("csr", (1, 3)), matrix.state_dict()) == (
        "the layer holds a weight of the format run16, which has no convolution of more than 1 x 1, but this layer is one")
    matrix = SparseLinear.from_dense(nn.Linear(16, 8), format="sparse_conv")
    assert message(matrix, packed_conv("sparse_conv", (1, 1)).state_dict()).endswith("but this layer multiplies by a matrix")
    network = nn.Sequential(SparseLinear.from_dense(nn.Linear(48, 8)))
    with pytest.raises(RuntimeError, match="0.layout holds a weight of 33 x 48, but this layer has 8 x 48"):
        network.load_state_dict({f"0.{key}": value for key, value in SparseLinear.from_dense(linear()).state_dict().items()})


def test_a_damaged_layout_is_one_sentence():
    layer = SparseLinear.from_dense(linear())
    state = layer.state_dict()
    layout = state["layout"]
    for bad in (layout.float(), layout.half(), torch.tensor(3), layout[None], layout[:5], layout[:0], torch.cat([layout, layout[:1]]),
                layout.int(), layout.clone().fill_(-1), layout.clone().fill_(2**40)):
        text = message(layer, state | {"layout": bad})
        assert text == f"layout ({bad.dtype}, {list(bad.shape)}) holds no description of a packed weight"


@pytest.mark.parametrize("name", LINEAR)
def test_frozen_stays_frozen(name):
    dense = linear()
    for weight, bias in ((False, False), (True, False), (False, True)):
        dense.weight.requires_grad_(weight), dense.bias.requires_grad_(bias)
        sparse = SparseLinear.from_dense(dense, format=name)
        back = sparse.to_dense()
        for layer in (sparse.values, back.weight):
            assert layer.requires_grad == weight
        assert sparse.bias.requires_grad == back.bias.requires_grad == bias
        sparse.load_state_dict(SparseLinear.from_dense(linear(0.1), format=name).state_dict())
        assert sparse.values.requires_grad == weight


def test_frozen_convolutions_and_computed_weights():
    assert not SparseConv2d.from_dense(conv().requires_grad_(False)).values.requires_grad
    dense = linear()
    prune.l1_unstructured(dense, "weight", 0.5)
    with torch.no_grad():
        dense(torch.ones(1, 48))
    assert SparseLinear.from_dense(dense, scale=torch.ones(33)).values.requires_grad


@pytest.mark.parametrize("name", LINEAR)
def test_a_fresh_process_reads_modules_and_programs(name, tmp_path):
    layer, x = SparseLinear.from_dense(linear(), format=name), torch.linspace(-1, 1, 96).view(2, 48)
    torch.save(layer, tmp_path / "layer.pt")
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "program.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "expected.pt")
    for read in ("torch.load(folder + '/layer.pt', weights_only=False)",
                 "__import__('kernels').SparseLinear and torch.export.load(folder + '/program.pt2').module()"):
        code = f"import sys, torch; folder = sys.argv[1]; x, y = torch.load(folder + '/expected.pt'); print(torch.equal({read}(x), y))"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr


def test_without_triton_everything_is_decoded():
    code = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; sys.modules['triton'] = None; import torch; from torch import nn; "
        "from kernels import SparseConv2d, SparseLinear\n"
        f"for name in {LINEAR}: dense = nn.Linear(48, 33); sparse = SparseLinear.from_dense(dense, format=name); x = torch.ones(2, 48); "
        "torch.testing.assert_close(sparse(x), dense(x))\n"
        "dense = nn.Conv2d(8, 4, 3); x = torch.ones(1, 8, 5, 5); y = SparseConv2d.from_dense(dense, format='sparse_conv')(x); "
        "torch.testing.assert_close(y, dense(x)); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
