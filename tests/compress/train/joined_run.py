"""One of several processes that train together; started by torchrun as `-m tests.compress.train.joined_run FOLDER`, or forked."""

import sys
from pathlib import Path

import torch
from torch import nn

from compress.config import TrainConfig
from compress.train import Dist, connect, evaluate, fit
from compress.train.checkpoint import digest
from compress.train.state import History
from tests.compress.train.helpers import small_bundle, small_network

SETTINGS = {"epochs": 3, "lr": 0.1, "ema": 0.5, "select": "val"}
BATCH = 15


def train(distributed: Dist, checkpoint: Path | None = None, norm: bool = False, after_step=None) -> tuple[nn.Module, History]:
    """71 images in batches of 15, the last one of 11: no batch can be halved. Ranks start from different weights on purpose."""
    torch.set_num_threads(1)
    model = small_network(norm=norm, dropout=0.0)
    if not distributed.is_main:
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    data = small_bundle(train=71, val=21)
    options = {"checkpoint": checkpoint, "distributed": distributed, "after_step": after_step}
    history = fit(model, data, TrainConfig(**SETTINGS), batch_size=BATCH, seed=2, **options)
    assert evaluate(model, data.test, 7, distributed=distributed)["accuracy"] == evaluate(model, data.test, 30)["accuracy"]
    return model, history


def report(folder: Path, distributed: Dist, norm: bool = False, **options) -> None:
    """Train and leave this rank's weights and history in `folder`."""
    model, history = train(distributed, norm=norm, **options)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    torch.save({"weights": model.state_dict(), "digest": digest(model.state_dict()), "history": rows}, folder / f"{distributed.rank}.pt")


if __name__ == "__main__":
    with connect("cpu", timeout_seconds=60) as process:
        report(Path(sys.argv[1]), process)
