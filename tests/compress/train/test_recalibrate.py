"""Oracle: BatchNorm statistics computed by hand from the layer's inputs."""

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.train import recalibrate


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, momentum=None)).double()
    for norm in (model[2], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model[2].eval()
    return model


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, 2, 5, 5, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)) for size in sizes]


def weighted(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    share = torch.tensor([len(part) for part in parts], dtype=torch.float64) / sum(len(part) for part in parts)
    mean = sum(s * part.mean((0, 2, 3)) for s, part in zip(share, parts, strict=True))
    var = sum(s * part.var((0, 2, 3), unbiased=True) for s, part in zip(share, parts, strict=True))
    return mean, var


def test_statistics_are_means_weighted_by_batch_size_and_the_rest_is_untouched():
    model, data = network(), batches(8, 8, 3)
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    recalibrate(model, data)
    first = [model[0](x) for x, _ in data]
    for norm, inputs in ((model[2], first), (model[4], [])):
        if not inputs:
            # The second BatchNorm sees what the first gave while it was measured: normalised by the batch's own statistics.
            scale = model[2].weight, model[2].bias
            inputs = [torch.relu(nn.functional.batch_norm(x, None, None, *scale, True, 0.0, model[2].eps)) for x in first]
        mean, var = weighted(inputs)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-10, atol=1e-12)
    assert [module.training for module in model.modules()] == flags
    assert (model[2].momentum, model[4].momentum) == (0.1, None)
    assert all(torch.equal(before[name], tensor) and tensor.grad is None for name, tensor in model.named_parameters())


def test_equal_batches_give_the_cumulative_average_of_torch():
    model, oracle, data = network(), network(), batches(4, 4, 4)
    oracle.load_state_dict(model.state_dict())
    recalibrate(model, data)
    oracle.eval()
    for norm in (oracle[2], oracle[4]):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x, _ in data:
        oracle(x)
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_called_twice_averages_over_its_calls():
    norm = nn.BatchNorm1d(2).double()
    x = torch.randn(6, 2, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x[:2]) + self.norm(x[2:]).sum()

    recalibrate(Twice(), [(x, None)])
    torch.testing.assert_close(norm.running_mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_one_image_at_the_end_joins_the_batch_before_it():
    model = nn.BatchNorm1d(3).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    recalibrate(model, [(x[:4], None), (x[4:], None)])
    torch.testing.assert_close(model.running_mean, x.mean(0))
    torch.testing.assert_close(model.running_var, x.var(0))


@pytest.mark.parametrize("data", [[], [(torch.randn(1, 2, 3, 3, dtype=torch.float64), None)]])
def test_without_enough_images_the_old_statistics_stay(data):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="BatchNorm statistics"):
        recalibrate(model, data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[2].momentum == 0.1 and not model[2]._forward_pre_hooks


def test_a_network_without_batchnorm_is_not_run():
    calls = []
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    recalibrate(model, [(torch.zeros(3, 2), None)])
    assert calls == []
