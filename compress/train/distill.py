"""The training objective: cross-entropy, and knowledge distillation from a teacher (Hinton, Vinyals and Dean 2015).

Symbols: student logits s [b, k], teacher logits t [b, k], labels y [b], temperature T, weight a.
    L = (1 - a) CE(s, y) + a T^2 KL(softmax(t / T) || softmax(s / T))
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compress.config import DistillConfig


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over the batch; logits [b, k], result [] in nats."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def objective(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: DistillConfig | None, label_smoothing: float) -> Tensor:
    """The loss L summed over the batch; without `distill` or `teacher` the cross-entropy alone."""
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    if distill is None or teacher is None:
        return loss
    return (1 - distill.weight) * loss + distill.weight * distillation_loss(logits, teacher, distill.temperature)
