"""Mean cross-entropy and accuracy over a split, in evaluation mode."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from compress.data.split import Split
from compress.errors import UserError
from compress.train.distributed import Dist
from compress.train.modes import mode


def evaluate(
    model: nn.Module,
    split: Split,
    batch_size: int,
    *,
    amp: Literal["off", "bf16"] = "off",
    channels_last: bool = False,
    distributed: Dist | None = None,
) -> dict[str, float]:
    """`{"loss": mean cross-entropy in nats, "accuracy": share in [0, 1]}` of `model` on `split`.

    No gradients, no random draws; train/eval flags are put back. Sums are float64, so that the batch size changes nothing but the rounding
    inside a batch. With several processes each takes its part of every batch and all get the same result.
    """
    if len(split) == 0:
        raise UserError("There is no image to evaluate on.")
    distributed = distributed or Dist()
    loss = torch.zeros((), dtype=torch.float64, device=split.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.device)
    with torch.no_grad(), mode(model, False):
        for x, y in split.batches(batch_size, rank=distributed.rank, world_size=distributed.world_size):
            if len(y) == 0:
                continue
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp == "bf16"):
                logits = model(x)
            loss += F.cross_entropy(logits.float(), y, reduction="none").double().sum()
            correct += (logits.argmax(1) == y).sum()
    distributed.sum_([loss, correct])
    return {"loss": loss.item() / len(split), "accuracy": correct.item() / len(split)}
