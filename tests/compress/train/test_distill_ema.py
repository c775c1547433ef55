"""Oracle: the formulas written out in float64 for the distillation loss and its gradient, the closed form of the average for EMA."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.config import DistillConfig
from compress.train.distill import distillation_loss, objective
from compress.train.ema import WeightAverage


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_t_squared_times_the_divergence(temperature):
    student, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    p, q = F.softmax(teacher / temperature, 1), F.softmax(student / temperature, 1)
    expected = temperature**2 * (p * (p / q).log()).sum()
    loss = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, temperature * (q - p), rtol=1e-10, atol=1e-12)


def test_a_student_equal_to_the_teacher_has_no_distillation_loss():
    logits = torch.randn(4, 6, dtype=torch.float64)
    # Adding a constant per row changes no softmax.
    assert distillation_loss(logits + torch.arange(4.0).view(-1, 1), logits, 3.0).item() == pytest.approx(0, abs=1e-12)


def test_objective_weighs_labels_and_teacher_per_image():
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    y = torch.tensor([0, 3, 6, 1, 1])
    smoothed = 0.9 * F.one_hot(y, 7).double() + 0.1 / 7
    labels = -(smoothed * F.log_softmax(student, 1)).sum()
    taught = 4.0 * F.kl_div(F.log_softmax(student / 2, 1), F.softmax(teacher / 2, 1), reduction="sum")
    both = objective(student, y, teacher, DistillConfig(temperature=2.0, weight=0.3), 0.1)
    torch.testing.assert_close(both, 0.7 * labels + 0.3 * taught, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(objective(student, y, None, None, 0.1), labels, rtol=1e-12, atol=1e-12)


def test_average_has_its_closed_form_and_skips_frozen_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64))
    model[1].bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.3)
    assert set(average.average) == {"0.weight", "0.bias", "1.weight"}
    history = [model[0].weight.detach().clone()]
    for _ in range(6):
        model[0].weight.data.add_(torch.randn(2, 2, dtype=torch.float64))
        history.append(model[0].weight.detach().clone())
        average.update()
    decays = [min(0.3, (1 + t) / (10 + t)) for t in range(1, 7)]
    assert decays[0] < 0.3 == decays[-1]
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for t, weight in enumerate(history):
        share = 1.0 if t == 0 else 1 - decays[t - 1]
        for later in decays[t:]:
            share *= later
        expected += share * weight
    torch.testing.assert_close(average.average["0.weight"], expected, rtol=1e-12, atol=1e-14)
    with average.applied():
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(model[0].weight, history[-1])
