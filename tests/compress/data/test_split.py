"""Oracle: laws of batching (every image once, processes and restarts agree with one process) and of stratified splits."""

import pytest
import torch

from compress.config import DataConfig
from compress.data import TensorSplit
from compress.data.bundle import tensor_bundle
from compress.data.split import batch_bounds
from compress.data.stratify import quotas, stratified
from compress.data.transforms import Transform
from compress.errors import UserError

CPU = torch.device("cpu")


def split(count: int = 23, padding: int = 1, flip: bool = True) -> TensorSplit:
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorSplit(images, torch.arange(count), Transform((0.5,), (0.25,), padding, flip), CPU)


def epoch(data: TensorSplit, size: int = 5, seed: int = 3, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(data.batches(size, generator=torch.Generator().manual_seed(seed), augment=True, shuffle=True, **options))


def test_every_image_comes_once_and_in_another_order_each_epoch():
    data = split()
    orders = [torch.cat([y for _, y in epoch(data, seed=seed)]) for seed in (1, 2)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(23))
    assert not torch.equal(*orders)
    plain = list(data.batches(5))
    assert torch.equal(torch.cat([y for _, y in plain]), torch.arange(23))
    torch.testing.assert_close(torch.cat([x for x, _ in plain]), (data.images / 255 - 0.5) / 0.25)


def test_the_batch_size_changes_no_image():
    data = split()
    whole = [torch.cat(parts) for parts in zip(*epoch(data, 23), strict=True)]
    for size in (1, 4, 22):
        assert all(torch.equal(torch.cat(parts), one) for parts, one in zip(zip(*epoch(data, size), strict=True), whole, strict=True))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_continued_epoch_is_the_rest_of_the_same_epoch(start):
    data = split()
    for (x, y), (again, labels) in zip(epoch(data)[start:], epoch(data, start=start), strict=True):
        assert torch.equal(x, again) and torch.equal(y, labels)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_each_batch(world):
    data = split()
    shares = [epoch(data, world_size=world, rank=rank) for rank in range(world)]
    for number, (x, y) in enumerate(epoch(data)):
        assert torch.equal(torch.cat([share[number][0] for share in shares]), x)
        assert torch.equal(torch.cat([share[number][1] for share in shares]), y)
        sizes = [len(share[number][1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("images", "size", "options", "expected"),
    [
        (10, 5, {}, [5, 5]),
        (11, 5, {}, [5, 5, 1]),
        (11, 5, {"min_last": 2}, [5, 6]),
        (12, 5, {"min_last": 2}, [5, 5, 2]),
        (11, 5, {"drop_last": True}, [5, 5]),
        (3, 5, {"drop_last": True}, []),
        (1, 5, {"min_last": 2}, [1]),
        (0, 5, {}, []),
    ],
)
def test_batch_sizes(images, size, options, expected):
    bounds = batch_bounds(images, size, **options)
    assert [last - first for first, last in bounds] == expected
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))


def test_draws_need_a_generator_and_impossible_shares_are_refused():
    for options in ({"shuffle": True}, {"augment": True}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match="generator|impossible"):
            next(iter(split().batches(4, **options)))


def test_the_global_random_state_is_not_used():
    before = torch.get_rng_state()
    epoch(split())
    assert torch.equal(torch.get_rng_state(), before)


def test_quotas_are_the_largest_remainders():
    # 10 of (5, 3, 12): shares 2.5, 1.5, 6; the last unit goes to the lower class of the tied remainders.
    assert quotas(torch.tensor([5, 3, 12]), 10).tolist() == [3, 1, 6]
    assert quotas(torch.tensor([1, 1, 8]), 9, keep=1).tolist() == [0, 0, 7]
    assert quotas(torch.tensor([0, 4]), 9).tolist() == [0, 4]
    sizes = torch.randint(1, 50, (20,))
    for count in (1, 7, 100):
        given = quotas(sizes, count)
        assert int(given.sum()) == count and ((given - sizes * count / sizes.sum()).abs() < 1).all()


def test_stratified_rows_are_distinct_and_have_their_quota():
    labels = torch.randint(0, 4, (101,))
    for generator in (None, torch.Generator().manual_seed(0)):
        rows = stratified(labels, 30, generator=generator)
        assert len(set(rows.tolist())) == 30 and torch.equal(rows, rows.sort().values)
        assert torch.equal(torch.bincount(labels[rows], minlength=4), quotas(torch.bincount(labels), 30))
    first, second = (stratified(labels, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("labels", "held", "settings", "said"),
    [
        ([0, 1, 2, 0], [0], {}, "training labels range from 0 to 2, but 2 classes allow only 0 to 1"),
        ([0, 1, -1], [0], {}, "training labels range from -1 to 1"),
        ([0, 1, 0, 1], [2], {}, "test labels range from 2 to 2"),
        ([0, 0, 0], [1], {}, "Class 1 of the data set 'digits' has no training image"),
        ([0, 1], [1], {}, "No validation image can be taken from the 2 training images"),
        ([1], [1], {"val_fraction": 0}, "Class 0 of the data set 'digits' has no training image"),
        ([0, 1], [], {"val_fraction": 0}, "test images are empty"),
        ([], [1], {"val_fraction": 0}, "training images are empty"),
    ],
)
def test_impossible_labels_are_one_sentence(labels, held, settings, said):
    parts = [(torch.zeros(len(part), 1, 2, 2, dtype=torch.uint8), torch.tensor(part, dtype=torch.int64)) for part in (labels, held)]
    with pytest.raises(UserError, match=said) as error:
        tensor_bundle(DataConfig(**settings), 0, CPU, *parts, 2, Transform((0.5,), (0.5,), 0, False))
    assert "\n" not in str(error.value)


def test_the_validation_images_leave_every_class_in_training():
    labels = torch.tensor([0] * 40 + [1] * 9 + [2])
    images = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = tensor_bundle(DataConfig(val_fraction=0.2), 0, CPU, (images, labels), (images, labels), 3, Transform((0.0,), (1.0,), 0, False))
    assert torch.bincount(data.val.labels, minlength=3).tolist() == [8, 2, 0]
    assert sorted(torch.cat([data.train.images, data.val.images]).flatten().tolist()) == list(range(50))
