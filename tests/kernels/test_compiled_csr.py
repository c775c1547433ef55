"""Oracle: the dense product and `F.conv2d` in float64, for cpu.c as this processor gets it and as lesser ones do."""

import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels import SparseLinear
from kernels.csr import compiled, op, reference

from .guarded import PROTECTS
from .subprocesses import started

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="this machine has no C compiler")
WIDTHS = (*range(1, 21), 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 112, 127, 128, 129, 200)
SETS = {"avx2": ("-march=haswell", 64), "sse": ("-march=x86-64-v2", 32)}


@pytest.fixture(scope="module", params=["native", *SETS])
def library(request, tmp_path_factory):
    """cpu.c for this processor, and for x86 with registers of 8 and of 4 floats."""
    if request.param == "native":
        return compiled.library()
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" and PROTECTS else ""
    if "avx2" not in flags or "fma" not in flags:
        pytest.skip("this processor cannot run code for x86 with AVX2")
    architecture, widest = SETS[request.param]
    built = tmp_path_factory.mktemp(request.param) / "cpu.so"
    given = [architecture if flag == "-march=native" else flag for flag in compiled.FLAGS]
    subprocess.run([os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc", *given, "-fopenmp", "-Wall", "-Wextra", "-Werror", "-o", str(built), str(compiled.SOURCE)], check=True)
    loaded = compiled.bound(built)
    assert loaded.csr_widest() == widest
    return loaded


def rows_of_every_length(columns: int) -> torch.Tensor:
    """A weight whose rows keep 0, 1, 2, ... up to all entries, in mixed order."""
    places = torch.rand(columns + 1, columns).argsort(1).argsort(1)
    return torch.randn(columns + 1, columns) * (places < torch.randperm(columns + 1).unsqueeze(1))


@pytest.fixture(params=[None, 1, 3000], ids=["whole", "rows of one", "blocks"])
def blocks(request, monkeypatch):
    """The dense operand in one piece, row by row, and in blocks of a few rows."""
    if request.param is not None:
        monkeypatch.setattr(compiled, "NEAR", request.param)
        monkeypatch.setattr(compiled, "WORK", 0)
        monkeypatch.setattr(compiled, "VECTORS", 0)
        monkeypatch.setattr(compiled, "REUSE", 100)
    chosen, block = [], compiled._block
    monkeypatch.setattr(compiled, "_block", lambda library, columns, *rest: chosen.append((columns, block(library, columns, *rest))) or chosen[-1][1])
    yield request.param
    if request.param == 1:  # a convolution's smallest block is a channel
        assert chosen and all(size <= max(1, columns // 4) for columns, size in chosen)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n", WIDTHS)
def test_products(library, n, narrow, blocks):
    torch.manual_seed(n)
    weight = rows_of_every_length(43)
    values, (crow, col) = reference.pack(weight, narrow=narrow)
    assert col.dtype == (torch.int16 if narrow else torch.int32)
    x, bias = torch.randn(3, 43, n), torch.randn(weight.shape[0])
    for relu in (False, True):
        expected = weight.double() @ x.double() + bias.double().unsqueeze(1)
        expected = expected.relu() if relu else expected
        for y in (compiled.matrix(library, x, values, crow, col, bias, relu, 1), compiled.matrix(library, x, values, crow, col, bias, relu, 2)):
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        turned = x[0].t().contiguous().t()
        y = compiled.matrix(library, turned, values, crow, col, bias, relu, 1)
        torch.testing.assert_close(y.double(), expected[0], rtol=1e-5, atol=1e-4)
    for threads in (1, 2):
        y = compiled.vector(library, x[0, :, 0].contiguous(), values, crow, col, bias, True, threads)
        torch.testing.assert_close(y.double(), (weight.double() @ x[0, :, 0].double() + bias.double()).relu(), rtol=1e-5, atol=1e-4)


def test_what_the_operators_refuse(library):
    weight = rows_of_every_length(10)
    values, (crow, col) = reference.pack(weight)
    with pytest.raises(ValueError, match="torch.int16 or torch.int32"):
        compiled.matrix(library, torch.randn(10, 4), values, crow, col.long(), None, False, 1)
    facts = None, None, None, 11, 10, values.numel(), [2], "none"
    with pytest.raises(ValueError, match="10 columns is no convolution with a kernel of 3 x 3"):
        op.csr_conv2d(torch.randn(1, 1, 5, 5), values, [crow, col], *facts, [3, 3], [1, 1], [0, 0], [1, 1])


@pytest.mark.parametrize("n", [1, 64, 65, 128, 130, 192, 300])
def test_products_cut_into_tiles_that_lie_in_one_piece(library, n, monkeypatch):
    torch.manual_seed(n)
    weight = rows_of_every_length(43)
    values, (crow, col) = reference.pack(weight)
    x = torch.randn(n, 43).t()
    expected = weight.double() @ x.double()
    pieces, unflatten = [], torch.Tensor.unflatten
    monkeypatch.setattr(torch.Tensor, "unflatten", lambda *arguments: pieces.append(arguments[2]) or unflatten(*arguments))
    for far in (43, 44):
        monkeypatch.setattr(compiled, "FAR", far)
        torch.testing.assert_close(compiled.matrix(library, x, values, crow, col, None, False, 1).double(), expected, rtol=1e-5, atol=1e-4)
    assert pieces == ([(-1, library.csr_widest())] if n > library.csr_widest() else [])


def test_columns_in_any_order(library, blocks):
    """A file may hold them so."""
    weight = rows_of_every_length(43)
    values, (crow, col) = reference.pack(weight)
    for first, last in zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True):
        order = first + torch.randperm(last - first)
        values[first:last], col[first:last] = values[order], col[order]
    for n in (1, 5, 64, 200):
        x = torch.randn(43, n)
        y = compiled.matrix(library, x, values, crow, col, None, False, 2)
        torch.testing.assert_close(y.double(), weight.double() @ x.double(), rtol=1e-5, atol=1e-4)


def test_a_block_is_used_where_a_row_has_work_for_it(library, monkeypatch):
    widest = library.csr_widest()
    whole, half = (compiled._block(library, 2048, width, 1024) for width in (widest, widest // 2))
    assert 2 * whole == half == compiled.NEAR // (4 * widest // 2) and 0 < whole < 2048
    assert [compiled._block(library, *given) for given in ((2048, widest, 8), (2048, widest // 8, 2048), (40, widest // 2, 40), (0, widest, 0))] == [
        2048, 2048, 40, 1]
    dense, sparse = (compiled._block(library, 4608, widest // 2, entries, 9, 9) for entries in (2304, 461))
    assert dense == 4608 and sparse % 9 == 0 and sparse < 4608
    monkeypatch.setattr(compiled, "NEAR", 0)
    monkeypatch.setattr(compiled, "WORK", 0)
    assert compiled._block(library, 2048, widest, 2048 / 9, 9) == 9


@pytest.mark.parametrize("rows, columns, n, images", [
    (0, 5, 3, None), (5, 0, 3, None), (5, 3, 0, None), (1, 1, 1, None), (1, 1, 1, 2), (4, 3, 5, 0), (0, 0, 0, None), (3, 3000, 0, None), (2, 4, 256, 2), (5, 0, 256, 2)])
def test_sizes_of_nothing_and_of_one(library, rows, columns, n, images):
    weight = torch.randn(rows, columns)
    values, (crow, col) = reference.pack(weight, narrow=True)
    x, bias = torch.randn(*([] if images is None else [images]), columns, n), torch.randn(rows)
    expected = (weight.double() @ x.double() + bias.double().unsqueeze(1)).relu()
    for threads in (1, 2):
        y = compiled.matrix(library, x, values, crow, col, bias, True, threads)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_passes_the_relu(library):
    values, (crow, col) = reference.pack(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    for n in WIDTHS:
        x = torch.stack([torch.full((n,), float("nan")), torch.full((n,), -1.0)])
        y = compiled.matrix(library, x, values, crow, col, None, True, 1)
        assert y[0].isnan().all() and (y[1] == 0).all()
        y = compiled.vector(library, x[:, 0].contiguous(), values, crow, col, None, True, 1)
        assert y[0].isnan() and y[1] == 0


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size, kernel, stride, padding, dilation", [
    ((2, 2), (3, 3), (1, 1), (1, 1), (1, 1)), ((7, 7), (3, 3), (1, 1), (1, 1), (1, 1)), ((1, 9), (1, 3), (1, 2), (0, 1), (1, 2)),
    ((13, 40), (5, 3), (2, 3), (2, 1), (1, 2)), ((17, 150), (3, 3), (1, 1), (1, 1), (1, 1))])
def test_convolutions(library, size, kernel, stride, padding, dilation, narrow, blocks):
    weight = rows_of_every_length(4 * kernel[0] * kernel[1])
    values, (crow, col) = reference.pack(weight, narrow=narrow)
    x = torch.randn(3, 4, *size)
    expected = F.conv2d(x.double(), weight.double().unflatten(1, (4, *kernel)), None, stride, padding, dilation)
    y = compiled.convolve(library, x, tuple(expected.shape[2:]), kernel, stride, padding, dilation, values, crow, col, None, False, 2)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not PROTECTS, reason="needs Linux")
@pytest.mark.parametrize("slack, killed", [(15, False), (2, True)])
def test_nothing_outside_of_the_buffers_is_touched(slack, killed, tmp_path):
    done = started("bounds", str(slack), interpret=False, cache=tmp_path)
    assert done.returncode == (-signal.SIGSEGV if killed else 0), done.stderr[-4000:]
    assert done.stdout.strip() == ("" if killed else "done")


@pytest.mark.parametrize("engine", reference.ENGINES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_inputs_of_any_strides(batch, engine):
    layer = nn.Linear(43, 44)
    layer.weight.data = rows_of_every_length(43)
    x = torch.randn(batch, 86)[:, ::2]
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        y = SparseLinear.from_dense(layer, format="csr", engine=engine)(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [2**15 - 1, 2**15, 2**15 + 1])
@pytest.mark.parametrize("engine", reference.ENGINES)
def test_columns_are_stored_in_16_bits_where_they_fit(columns, engine):
    layer = nn.Linear(columns, 3)
    layer.weight.data[:, : columns - 40] = 0
    sparse = SparseLinear.from_dense(layer, format="csr", engine=engine)
    crow, col = sparse.packed.index
    assert col.dtype == (torch.int16 if engine == "compiled" and columns <= 2**15 else torch.int32)
    assert op.pack(layer.weight, engine=engine).bytes == sparse.values.numel() * (4 + col.element_size()) + 4 * 4
    assert torch.equal(sparse.to_dense().weight, layer.weight)
    for batch in (1, 3):
        x = torch.randn(batch, columns)
        torch.testing.assert_close(sparse(x).double(), F.linear(x.double(), layer.weight.double(), layer.bias.double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("engine", reference.ENGINES)
def test_any_engine_reads_columns_of_16_and_of_32_bits(engine):
    """A file may come from a machine whose engine this one lacks, or be older than columns of 16 bits."""
    layer = nn.Linear(43, 44)
    layer.weight.data = rows_of_every_length(43)
    x = torch.randn(5, 43)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    for other in ("compiled", "torch"):
        loaded = SparseLinear.from_dense(nn.Linear(43, 44), format="csr", engine=engine)
        state = SparseLinear.from_dense(layer, format="csr", engine=other).state_dict()
        loaded.load_state_dict(state)
        loaded.options = [reference.ENGINES.index(engine)]
        torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_offsets_beyond_32_bits(library):
    """The last rows of an operand of 2^31 + 16 elements, of which nothing else is ever touched."""
    columns = 2**27 + 1
    try:
        x = torch.from_numpy(numpy.zeros((columns, 16), numpy.float32))
    except MemoryError:
        pytest.skip("8 GiB of address space cannot be had")
    x[-1], x[0] = 2.0, 3.0
    crow, col = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([columns - 1, 0, columns - 1], dtype=torch.int32)
    y = compiled.matrix(library, x, torch.tensor([1.0, 10.0, 1.0]), crow, col, None, False, 1)
    assert (y[0] == 2).all() and (y[1] == 32).all()
