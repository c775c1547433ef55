"""Oracle: curvlinops 3.0.1 and nngeometry 0.4, compared as products of the factors (their scalings put 1/T elsewhere)."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.curvature import collect
from tests.compress.curvature.nets import plain_convnet, randn


def near(actual, expected, tolerance=1e-8):
    return (actual - expected).norm() <= tolerance * expected.norm()


def data():
    return randn(7, 2, 6, 6), torch.tensor([0, 2, 1, 1, 0, 2, 0])


def curvlinops_block(operator, name):
    """G (x) A of one layer of a K-FAC operator; the constructor has filled the factors already, computing them again would double them."""
    return torch.kron(operator._gradient_covariances[name], operator._input_covariances[name])


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_kfac_products_equal_curvlinops(fisher):
    curvlinops = pytest.importorskip("curvlinops")
    from curvlinops.kfac import FisherType, KFACType

    net, (x, y) = plain_convnet(), data()
    kind = FisherType.TYPE2 if fisher == "exact" else FisherType.EMPIRICAL
    operator = curvlinops.KFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(x[:4], y[:4]), (x[4:], y[4:])],
        fisher_type=kind,
        kfac_approx=KFACType.EXPAND,
        separate_weight_and_bias=False,
    )
    ours = collect(net, [(x[:4], y[:4]), (x[4:], y[4:])], fisher=fisher)
    for name, entry in ours.items():
        assert near(entry.block(), curvlinops_block(operator, name))


def test_ekfac_equals_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    from curvlinops.kfac import FisherType, KFACType

    net, (x, y) = plain_convnet(), data()
    operator = curvlinops.EKFACLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], fisher_type=FisherType.TYPE2,
                                              kfac_approx=KFACType.EXPAND, separate_weight_and_bias=False)
    size = sum(parameter.numel() for parameter in net.parameters())
    dense = operator @ torch.eye(size, dtype=torch.float64)
    ours = collect(net, [(x, y)], fisher="exact", ekfac=True)
    start = 0
    for name, entry in ours.items():
        module = net.get_submodule(name)
        weights, biases = module.weight.numel(), module.bias.numel()
        block = dense[start:start + weights + biases, start:start + weights + biases]
        # their order is all weights, then all biases; ours has the bias as the last column of every row
        width = weights // biases
        order = torch.cat(
            [torch.cat([torch.arange(row * width, (row + 1) * width), torch.tensor([weights + row])]) for row in range(biases)]
        )
        assert near(entry.block(corrected=True), block[order][:, order])
        start += weights + biases


def test_kfac_products_and_ekfac_traces_equal_nngeometry():
    nngeometry = pytest.importorskip("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatEKFAC, PMatKFAC

    del nngeometry
    net, (x, y) = plain_convnet(), data()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        loader = DataLoader(TensorDataset(x, y), batch_size=7)
        kfac = FIM(model=net, loader=loader, representation=PMatKFAC, variant="classif_logits", device="cpu")
        ekfac = FIM(model=net, loader=loader, representation=PMatEKFAC, variant="classif_logits", device="cpu")
        ekfac.update_diag(loader)
    finally:
        torch.set_default_dtype(default)
    ours = collect(net, [x], fisher="exact", ekfac=True)
    for (layer_id, (a, g)), (name, entry) in zip(kfac.data.items(), ours.items(), strict=True):
        assert g.shape == entry.G.shape, name
        assert near(entry.block(), torch.kron(g, a))
        assert entry.second.sum().item() == pytest.approx(ekfac.data[1][layer_id].sum().item(), rel=1e-8)
