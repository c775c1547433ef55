"""Progress of a training: a tqdm bar per epoch on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

Log = Callable[[str], None]


def epoch_line(row: dict, epochs: int) -> str:
    """One line about a row of the history."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"lr {row['lr']:.3g}"]
    parts += [f"loss {row['train_loss']:.4f}", f"accuracy {row['train_accuracy']:.4f}"]
    if row["val_accuracy"] is not None:
        parts += [f"val loss {row['val_loss']:.4f}", f"val accuracy {row['val_accuracy']:.4f}"]
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


class Progress:
    """Lines go to `log` (none: silent); a bar is shown as well where `stream` is a terminal."""

    def __init__(self, log: Log | None, stream: TextIO | None = None) -> None:
        self._log = log
        self._stream = stream or sys.stderr
        self._terminal = log is not None and self._stream.isatty()
        self._bar: tqdm | None = None

    def start_epoch(self, epoch: int, epochs: int, done: int, steps: int) -> None:
        """Show epoch `epoch` (from 1) of `epochs` at step `done` of `steps`."""
        if self._terminal:
            self._bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch}/{epochs}", unit="step", file=self._stream, leave=False)

    def step(self, loss: float) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """A line to `log`; the bar is taken away first, so that both are readable."""
        self.close()
        if self._log is not None:
            self._log(text)
