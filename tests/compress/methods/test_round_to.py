"""Oracle: divisibility of the ranks, and counts of the materialised network."""

import pytest
import torch

from compress import compress
from compress.cost import count
from compress.errors import UserError
from compress.methods import method, names
from compress.methods.menus import _ladder
from models import build

X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(32) % 10)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("resnet20", 10, width=0.5).eval()  # widths 8, 16, 32


@pytest.mark.parametrize("name", ["svd", "tucker", "cp", "kfac_svd", "kfac_tucker"])
@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_ranks_are_multiples_and_the_budget_is_met_from_below(network, name, quantity):
    small, _, report = compress(network, X[:1], BATCHES, method=name, budget={quantity: 0.3}, round_to=4)
    removed = 1 - getattr(count(small, X[:1]), quantity) / getattr(count(network, X[:1]), quantity)
    assert 0.29 <= removed <= 0.36
    assert report.ranks
    for sizes, ranks in report.ranks.values():
        assert all(rank % 4 == 0 or size < 4 for size, rank in zip(sizes, ranks))


def test_ladders_hold_multiples_up_to_the_side_and_every_rank_of_a_narrower_one():
    for size in range(1, 70):
        for unit in (1, 3, 8):
            ladder = _ladder(size, 20, unit)
            assert ladder == sorted(set(ladder)) and 1 <= ladder[0] and len(ladder) <= 20
            if unit <= size:
                assert all(rank % unit == 0 for rank in ladder) and ladder[-1] == size // unit * unit
                assert len(ladder) == min(20, size // unit)
            else:
                assert ladder == _ladder(size, 20, 1)


@pytest.mark.parametrize("name", [name for name in names() if not method(name).rounds_widths])
def test_a_method_without_multiples_refuses_them_in_one_sentence(network, name):
    budget = {method(name).budgets[0]: 0.3}
    with pytest.raises(UserError, match="round_to") as raised:
        compress(network, X[:1], BATCHES, method=name, budget=budget, round_to=4)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_which_methods_have_multiples():
    without = {name for name in names() if not method(name).rounds_widths}
    assert {"eigendamage", "eigendamage_depthwise", "improved_eigendamage", "mask_magnitude"} <= without
    assert not without & {"l1", "taylor_fo", "svd", "tucker", "cp", "kfac_svd", "kfac_tucker"}
