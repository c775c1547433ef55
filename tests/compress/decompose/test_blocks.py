"""Oracle: the layer or block before the change, the SVD of the averaged core, and PyTorch's own compiler and ONNX Runtime."""

import copy

import pytest
import torch
from torch import nn

from compress.decompose import FactorizedConv2d, FactorizedLinear, factorize, recompose
from compress.decompose.budget import eigendamage_round
from compress.decompose.eigen import depthwise
from compress.decompose.factors import Factors
from compress.decompose.improved import ImprovedOptions
from compress.decompose.modules import dense_weight, replace_module
from compress.decompose.rounds import EigenDamageOptions, apply_round, proposal, scores, select
from compress.decompose.selection import Sides
from compress.errors import UserError
from compress.export import to_onnx
from compress.methods import parse_options
from tests.compress.decompose.nets import batches, network
from tests.compress.decompose.test_modules import moment

X = torch.cat([x for x, _ in batches()])
OPTIONS = EigenDamageOptions(fisher="exact", ekfac=False, pool_fraction=0.4, cap=0.5)
RANKS = {"svd": 3, "tucker2": (3, 3), "cp": 3, "eigendamage": (3, 3), "kfac_svd": 3, "kfac_tucker2": (3, 3)}


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(method):
    return {"A": moment(55, 0), "G": moment(8, 1)} if method in ("eigendamage", "kfac_svd", "kfac_tucker2") else {}


def test_splitting_by_svd_keeps_the_diagonal_in_the_bases_of_the_mean():
    core, factors = weight(5, 4, 3, 3, seed=1), Factors(weight(4, 6), weight(5, 4, 3, 3, seed=1), weight(8, 5, seed=2))
    split = depthwise(factors, 3, method="svd")
    u, _, vh = torch.linalg.svd(core.mean((2, 3)))
    assert split.depthwise and split.core.shape == (3, 1, 3, 3)
    for k in range(3):
        rotated = u[:, :3].T @ core[:, :, k, 1] @ vh[:3].T
        torch.testing.assert_close(split.core[:, 0, k, 1].abs(), rotated.diagonal().abs())
    inside = torch.einsum("pr,rkl,qr->pqkl", u[:, :3], split.core[:, 0], vh[:3].T)
    torch.testing.assert_close(recompose(split), torch.einsum("op,pqkl,qc->ockl", factors.output, inside, factors.input))


def test_splitting_by_svd_recovers_a_core_that_is_diagonal_in_orthonormal_bases():
    left, right = torch.linalg.qr(weight(5, 4))[0], torch.linalg.qr(weight(4, 4, seed=1))[0]
    kernels = weight(4, 3, 3, seed=2) + torch.arange(4).add(1).mul(3)[:, None, None]  # means apart, so that the bases are unique
    factors = Factors(weight(4, 6), torch.einsum("pr,rkl,qr->pqkl", left, kernels, right), weight(8, 5, seed=3))
    torch.testing.assert_close(recompose(depthwise(factors, method="svd")), recompose(factors), rtol=1e-9, atol=1e-9)


def test_the_option_says_how_cores_are_split():
    net, blocks = network(), {}
    for how in (True, "cp", "svd"):
        options = OPTIONS.model_copy(update={"depthwise": how})
        entries = scores(net, batches(), options)
        cut = copy.deepcopy(net)
        kept = select(entries, options)
        assert "b" in apply_round(cut, entries, kept, options)
        blocks[how], inner = dense_weight(cut.b), proposal(entries["b"], kept["b"], options.unsplit())
        expected = recompose(depthwise(inner, method="svd" if how == "svd" else "cp"))
        torch.testing.assert_close(blocks[how], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(blocks[True], blocks["cp"]) and not torch.allclose(blocks[True], blocks["svd"])


def test_the_published_name_of_the_labels_is_understood():
    for options in (EigenDamageOptions, ImprovedOptions):
        assert options(fisher_type="empirical") == options(fisher="empirical") != options()
        assert options(fisher_type="empirical").model_dump()["fisher"] == "empirical"
    with pytest.raises(UserError, match="'fisher_type' of method 'eigendamage' is 'some'"):
        parse_options("eigendamage", EigenDamageOptions, {"fisher_type": "some"})
    with pytest.raises(UserError, match="no option 'fisher_type'"):
        parse_options("eigendamage", EigenDamageOptions, {"fisher_type": "true", "fisher": "exact"})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("method", list(RANKS))
def test_every_data_type_is_decomposed_as_its_double(method, dtype, tolerance):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1).to(dtype)
    block = factorize(conv, method, RANKS[method], **moments(method))
    assert isinstance(block, FactorizedConv2d) and {parameter.dtype for parameter in block.parameters()} == {dtype}
    expected = dense_weight(factorize(copy.deepcopy(conv).double(), method, RANKS[method], **moments(method)))
    error = recompose(block.factors().map(lambda tensor: tensor.double())) - expected
    assert error.norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("method", list(RANKS))
def test_a_compiled_block_computes_the_same_in_one_graph(method):
    block = factorize(nn.Conv2d(6, 8, 3, stride=2, padding=1).double(), method, RANKS[method], **moments(method))
    x = weight(2, 6, 7, 7)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.slow_ci
@pytest.mark.parametrize("method", ["cp", "eigendamage"])
def test_blocks_are_written_as_onnx_and_read_back(method, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()).eval()
    replace_module(net, "0", factorize(net[0], method, RANKS[method], **moments(method)))
    x = weight(2, 6, 7, 7).float()
    to_onnx(net, x, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


def test_normalisation_decides_what_a_whole_round_keeps():
    """Scores by hand: layer "b" is 1000 times "a", so that raw scores empty "a" and scores by share cut the same places of both."""
    net, options = network(), OPTIONS.model_copy(update={"cap": 1.0, "pool_fraction": 0.5})
    rows, columns = torch.arange(1.0, 17), torch.ones(8)
    entries = {name: entry for name, entry in scores(net, batches(), options).items() if name in ("a", "b")}
    entries["a"].sides = Sides(rows, columns * 0.5)
    entries["b"].sides = Sides(1000 * rows, 1000 * torch.ones(16))
    # of 16 + 8 + 16 + 16 scores the 28th lowest decides: 24 belong to "a", and it is 1000, as the columns and the lowest row of "b"
    kept = select(entries, options)
    assert kept["a"].rows.tolist() == [15] and len(kept["a"].columns) == 1
    assert kept["b"].rows.tolist() == list(range(1, 16)) and len(kept["b"].columns) == 1
    # in 136ths the shares are 1 .. 16 of the rows in both layers, 17 of the columns of "a" and 8.5 of those of "b": below 8.5 are the
    # eight lowest rows of both, sixteen in all, and the 28th is one of the sixteen at 8.5
    shared = select(entries, options.model_copy(update={"normalize": True}))
    assert shared["a"].rows.tolist() == shared["b"].rows.tolist() == list(range(8, 16))
    assert len(shared["a"].columns) == 8 and len(shared["b"].columns) == 1
    cut = copy.deepcopy(net)
    normalized = options.model_copy(update={"normalize": True})
    assert apply_round(cut, entries, shared, normalized) == ["a", "b"]
    assert (cut.a.core.weight.shape[:2], cut.b.core.weight.shape[:2]) == ((8, 8), (8, 1))


class Mixed(nn.Module):
    """A strided 1x1 and a kx1 convolution, and a hidden linear layer on every position."""

    def __init__(self):
        super().__init__()
        self.stem, self.short = nn.Conv2d(3, 12, (3, 1), stride=(2, 1), padding=(1, 0)), nn.Conv2d(12, 16, 1, stride=2)
        self.hidden, self.head = nn.Linear(16, 20), nn.Linear(20, 4)

    def forward(self, x):
        x = self.short(self.stem(x).relu()).relu().flatten(2).transpose(1, 2)
        return self.head(self.hidden(x).relu().mean(1))


def test_rounds_merge_in_linear_strided_1x1_and_kx1_blocks():
    torch.manual_seed(0)
    net = Mixed().double().eval()
    geometry = {"stem": ("core", (3, 1), (2, 1)), "short": ("input", (1, 1), (2, 2))}
    options = OPTIONS.model_copy(update={"accept": "params"})
    # a first cut at a third of every side, by hand: a round of its own would leave the stem, of three channels, as it is
    entries = scores(net, batches(), options)
    third = {name: Sides(*(torch.arange(n - n // 3, n) for n in entry.weight.shape[:2])) for name, entry in entries.items()}
    for name, entry in entries.items():
        replace_module(net, name, apply_by_hand(entry, third[name], options))
    for _ in range(2):
        entries = scores(net, batches(), options)
        assert set(entries) == {"stem", "short", "hidden"}
        everything = {name: Sides(*(torch.arange(n) for n in entry.weight.shape[:2])) for name, entry in entries.items()}
        before, y = copy.deepcopy(net), net(X)
        for name, entry in entries.items():
            replace_module(net, name, apply_by_hand(entry, everything[name], options))
        torch.testing.assert_close(net(X), y, rtol=1e-9, atol=1e-9)
        assert isinstance(net.hidden, FactorizedLinear)
        for name in entries:
            block, old = net.get_submodule(name), before.get_submodule(name)
            torch.testing.assert_close(dense_weight(block), dense_weight(old), rtol=0, atol=1e-11)
            assert [part.weight.shape for part in block] == [part.weight.shape for part in old]
        for name, (owner, kernel, stride) in geometry.items():
            block = net.get_submodule(name)
            assert block.core.kernel_size == kernel and getattr(block, owner).stride == stride
            assert all(part.stride == (1, 1) for part in block if part is not getattr(block, owner))
        net = before
        parameters = sum(p.numel() for p in net.parameters())
        assert "hidden" in eigendamage_round(net, batches(), options)
        assert sum(p.numel() for p in net.parameters()) < parameters and torch.isfinite(net(X)).all()
        assert (net.hidden.input.in_features, net.hidden.output.out_features) == (16, 20)


def apply_by_hand(entry, kept, options):
    return factorize(entry.module, proposal(entry, kept, options), only_if_smaller=False)
