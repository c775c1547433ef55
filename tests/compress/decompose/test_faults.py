"""Oracle: the docstrings, which promise one sentence of a UserError for every argument that does not fit, and the shape of `recompose`."""

import pytest
import torch
from torch import nn

from compress.decompose import cp, eigendamage, factorize, kfac_svd, kfac_tucker2, recompose, tucker2
from compress.decompose.eigen import depthwise
from compress.decompose.factors import Factors, composed_shape
from compress.decompose.kfac import whitened_spectrum
from compress.errors import UserError

CONV, GROUPED, LINEAR = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, groups=2), nn.Linear(6, 8)
W, CORE = CONV.weight.detach(), torch.ones(4, 3, 3, 3)


def eye(size, groups=None):
    return torch.eye(size, dtype=torch.float64) if groups is None else torch.eye(size, dtype=torch.float64).repeat(groups, 1, 1)


def ones(*shape):
    return torch.ones(*shape)


MOMENTS = {"eigendamage": lambda A, G: eigendamage(W, A, G, (4, 3)), "kfac_tucker2": lambda A, G: kfac_tucker2(W, A, G, (4, 3)),
           "kfac_svd": lambda A, G: kfac_svd(W, A, G, 4), "whitened_spectrum": lambda A, G: whitened_spectrum(W, A, G)}


def message(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and len(error.value.faults) == 1
    return str(error.value)


@pytest.mark.parametrize("method", ["tucker2", "eigendamage", "kfac_tucker2"])
@pytest.mark.parametrize("ranks", [4, (4,), (4, 3, 2), "43", (4, 2.0), (4, 7), (0, 3), (True, 3)])
def test_ranks_are_two_integers_in_range(method, ranks):
    text = message(lambda: factorize(CONV, method, ranks, A=eye(6), G=eye(8)))
    assert "rank" in text and repr(ranks[1] if ranks in ((4, 2.0), (4, 7)) else ranks[0] if ranks in ((0, 3), (True, 3)) else ranks) in text


def test_a_list_is_a_pair_too():
    assert tucker2(W, [4, 3]).ranks == (4, 3)


@pytest.mark.parametrize("method", list(MOMENTS))
@pytest.mark.parametrize("A, G, words", [
    (eye(6), eye(7), ("G", "(7, 7)", "8")),
    (eye(6), ones(8), ("G", "(8,)", "8")),
    (eye(7), eye(8), ("A", "(7, 7)", "54", "55", "6 (channels)")),
    (ones(5, 6), eye(8), ("A", "(5, 6)")),
    (ones(6), eye(8), ("A", "(6,)")),
    (eye(6, 1), eye(8), ("A", "(1, 6, 6)")),
    ([1.0], eye(8), ("A", "list")),
])
def test_moments_belong_to_the_weight(method, A, G, words):
    text = message(lambda: MOMENTS[method](A, G))
    assert all(word in text for word in words)


@pytest.mark.parametrize("call, words", [
    (lambda: eigendamage(W, eye(6), eye(8), (4, 3), second=ones(8, 5)), "(8, 5)"),
    (lambda: eigendamage(W, eye(6), eye(8), (4, 3), second=3), "int"),
    # moments of full patches: of the right number, in the basis of the patches
    (lambda: eigendamage(W, eye(6), eye(8), (4, 3), second=ones(8, 54)), "(8, 54)"),
    (lambda: kfac_svd(W, eye(6), eye(8), 2, damping=-1.0), "-1.0"),
    (lambda: kfac_tucker2(W, eye(6), eye(8), (2, 2), damping=float("nan")), "nan"),
    (lambda: kfac_tucker2(W, eye(6), eye(8), (2, 2), sweeps=0), "0"),
    (lambda: tucker2(W, (2, 2), sweeps=0), "0"),
    (lambda: tucker2(W.numpy(), (2, 2)), "ndarray"),
    (lambda: cp(W, 2, sweeps=1.5), "1.5"),
    (lambda: factorize(GROUPED, "eigendamage", (2, 2), A=eye(3), G=eye(4, 2)), "2 groups"),
    (lambda: factorize(GROUPED, "eigendamage", (2, 2), A=eye(3, 3), G=eye(4, 2)), "(3, 3, 3)"),
    (lambda: factorize(GROUPED, "kfac_svd", 2, A=eye(3, 2), G=eye(8)), "G of shape (8, 8)"),
    (lambda: factorize(GROUPED, "eigendamage", (2, 2), A=eye(3, 2), G=eye(4, 2), second=ones(4, 3)), "second of shape (4, 3)"),
    (lambda: factorize(CONV, "svd", 2, sweeps=3), "no option 'sweeps'"),
    (lambda: factorize(CONV, "tucker2", (2, 2), sweep=3), "did you mean 'sweeps'"),
    (lambda: factorize(CONV, None, 2), "None"),
    (lambda: factorize(CONV, "svd", 2, input_shape=(6,)), "(6,)"),
    (lambda: factorize(CONV, "svd", 2, input_shape=(9, 9)), "(9, 9)"),
    (lambda: factorize(CONV, "svd", 2, input_shape=(5, 9, 9)), "[6, height, width]"),
    (lambda: factorize(GROUPED, "svd", 2, input_shape=(6, 2, 9)), "large enough"),
    (lambda: factorize(LINEAR, "svd", 2, input_shape=(6, 3)), "[..., 6]"),
    (lambda: depthwise(Factors(ones(3, 6), CORE, ones(8, 4)), method="dct"), "'dct'"),
    (lambda: depthwise(Factors(ones(3, 6), None, ones(8, 3))), "core"),
])
def test_other_arguments(call, words):
    assert words in message(call)


@pytest.mark.parametrize("factors", [
    Factors(None, None, None),
    Factors(ones(3, 6), ones(4, 2, 3, 3), ones(8, 4)),
    Factors(ones(1, 6), CORE, ones(8, 4)),  # einsum would broadcast the one
    Factors(ones(3, 6), CORE, ones(8, 5)),
    Factors(ones(3, 6), CORE, ones(8, 4, 3, 3)),  # two kernels over the same axes are not their product
    Factors(None, ones(3, 6, 3, 1), ones(8, 3, 3, 3)),
    Factors(ones(3, 6, 1, 1), CORE, ones(8, 4)),
    Factors(ones(3, 6), ones(3, 1, 3, 3), ones(8, 4), depthwise=True),
    Factors(ones(3, 6), ones(3, 3, 3, 3), ones(8, 3), depthwise=True),
    Factors(None, ones(3, 1, 3, 3), ones(8, 3), depthwise=True),
    Factors(ones(0, 6), ones(4, 0, 3, 3), ones(8, 4)),
    Factors(ones(3, 3), ones(4, 3, 3, 3), ones(8, 2), groups=2),
    Factors(ones(4), CORE, ones(8, 4)),
])
def test_factors_that_do_not_compose_are_refused(factors):
    text = message(lambda: factorize(GROUPED if factors.groups > 1 else CONV, factors))
    assert "compose" in text or "empty" in text


@pytest.mark.parametrize("factors", [
    Factors(ones(3, 6), CORE, ones(8, 4)),
    Factors(ones(3, 6), CORE, None),
    Factors(None, ones(4, 6, 3, 3), ones(8, 4)),
    Factors(None, ones(4, 6, 3, 1), ones(8, 4, 1, 2)),
    Factors(ones(3, 6), ones(4, 3), ones(8, 4)),
    Factors(ones(3, 6), None, ones(8, 3)),
    Factors(ones(3, 6), ones(3, 1, 3, 2), ones(8, 3), depthwise=True),
    Factors(ones(4, 3), ones(6, 2, 3, 3), ones(8, 3), groups=2),
    Factors(ones(4, 3), ones(4, 1, 3, 3), ones(8, 2), depthwise=True, groups=2),
    Factors(None, None, ones(8, 6, 3, 3)),
])
def test_the_composed_shape_is_that_of_the_product(factors):
    assert composed_shape(factors) == tuple(recompose(factors).shape)


def test_every_group_is_decomposed_with_its_own_second_moments():
    torch.manual_seed(0)
    A, G, second = (torch.rand(2, 3, 9).double() for _ in range(3))
    A, G, second = A @ A.mT, torch.rand(2, 4, 9).double(), torch.rand(2, 4, 3).double()
    G = G @ G.mT
    block = factorize(GROUPED, "eigendamage", (2, 2), A=A, G=G, second=second, only_if_smaller=False)
    parts = [eigendamage(w, *moments[:2], (2, 2), moments[2]) for w, *moments in zip(GROUPED.weight.chunk(2), A, G, second, strict=True)]
    torch.testing.assert_close(recompose(block.factors()), recompose(Factors.join(parts)))
