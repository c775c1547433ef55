"""A training that a test starts as a program of its own and kills: `python -m tests.compress.train.killed_run CHECKPOINT KIND PAUSE`."""

import sys
import time
from pathlib import Path

import torch

from compress.config import TrainConfig
from compress.train import fit
from compress.train.checkpoint import digest
from compress.train.state import History
from tests.compress.train.helpers import small_bundle, small_network

KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.02, "ema": 0.8, "select": "val", "schedule": "onecycle", "channels_last": True},
    "adamw": {"optimizer": "adamw", "lr": 0.02, "amp": "bf16", "ema": 0.9, "grad_clip": 0.5, "schedule": "multistep", "warmup_epochs": 1.0},
}
EPOCHS = 6


def train(checkpoint: Path | None, kind: str, pause: float = 0.0, after_step=None) -> tuple[str, History]:
    """The hash of the weights at the end of one training with dropout, augmentation and BatchNorm, and its history without times."""
    torch.set_num_threads(1)
    model = small_network(dropout=0.4)

    def wait() -> None:
        time.sleep(pause)
        if after_step is not None:
            after_step()

    cfg = TrainConfig(epochs=EPOCHS, **KINDS[kind])
    history = fit(model, small_bundle(), cfg, batch_size=16, seed=4, checkpoint=checkpoint, after_step=wait)
    return digest(model.state_dict()), [{key: value for key, value in row.items() if key != "seconds"} for row in history]


if __name__ == "__main__":
    print(train(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))[0])
