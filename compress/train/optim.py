"""Optimisers, and learning-rate schedules as closed formulas of the step.

Symbols: step t = 0..T-1 of T, w warm-up steps, peak rate r.
    warm-up (all but onecycle)   r (t + 1) / w                                    for t < w
    multistep                    r gamma^(number of milestones m with t >= round(m T))
    cosine                       r (1 + cos(pi (t - w) / (T - w))) / 2            (Loshchilov and Hutter 2017)
    onecycle                     cosine from r/25 up to r at t = 0.3 T - 1, then down to r/250000 at T - 1  (Smith and Topin 2018)
"""

from __future__ import annotations

import math

import torch
from torch import nn

from compress.config import TrainConfig

_WARM_SHARE, _START_DIVISOR, _END_DIVISOR = 0.3, 25.0, 1e4


def learning_rate(cfg: TrainConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0) of `total` steps."""
    if cfg.schedule == "onecycle":
        return _onecycle(cfg.lr, step, total)
    warm = min(cfg.warmup_epochs * steps_per_epoch, total)
    if step < warm:
        return cfg.lr * min((step + 1) / warm, 1.0)
    if cfg.schedule == "multistep":
        return cfg.lr * cfg.gamma ** sum(step >= round(milestone * total) for milestone in cfg.milestones)
    if cfg.schedule == "cosine":
        return cfg.lr * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
    return cfg.lr


def _onecycle(peak: float, step: int, total: int) -> float:
    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    low = peak / _START_DIVISOR
    top = max(_WARM_SHARE * total - 1, 0.0)
    if step <= top:
        return between(low, peak, step / top if top else 1.0)
    return between(peak, low / _END_DIVISOR, (step - top) / (total - 1 - top))


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict]:
    """Trainable parameters in optimiser groups; without `decay_norm_and_bias`, vectors (biases, normalisation) have no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norm_and_bias:
        return [{"params": trainable, "weight_decay": weight_decay}]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """SGD (Nesterov where there is momentum), Adam, AdamW or RMSprop over the trainable parameters; the rate is set before every step."""
    groups = parameter_groups(model, cfg.weight_decay, cfg.decay_norm_and_bias)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov and cfg.momentum > 0)
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=cfg.lr, momentum=cfg.momentum)
    kind = torch.optim.Adam if cfg.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=cfg.lr, betas=(cfg.momentum, 0.999))
