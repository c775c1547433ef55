"""Oracle: the lines and bars that a terminal and a plain stream are documented to receive."""

import io

from compress.train.progress import Progress, epoch_line

ROW = {"epoch": 2, "lr": 0.05, "train_loss": 1.25, "train_accuracy": 0.5, "val_loss": 1.5, "val_accuracy": 0.25, "seconds": 3.04}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, log) -> None:
    progress = Progress(log, stream)
    progress.start_epoch(2, 9, 1, 4)
    progress.step(1.5)
    progress.line("a line")


def test_a_terminal_shows_a_bar_and_the_lines():
    stream, lines = Terminal(), []
    drive(stream, lines.append)
    assert "epoch 2/9" in stream.getvalue() and "1/4" in stream.getvalue()
    assert lines == ["a line"]


def test_elsewhere_there_are_only_lines_and_without_log_nothing():
    stream, lines = io.StringIO(), []
    drive(stream, lines.append)
    assert (stream.getvalue(), lines) == ("", ["a line"])
    stream = Terminal()
    drive(stream, None)
    assert stream.getvalue() == ""


def test_the_line_of_an_epoch():
    assert epoch_line(ROW, 9) == "epoch 2/9  lr 0.05  loss 1.2500  accuracy 0.5000  val loss 1.5000  val accuracy 0.2500  3.0 s"
    assert "val" not in epoch_line({**ROW, "val_loss": None, "val_accuracy": None}, 9)
