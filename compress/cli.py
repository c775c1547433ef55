"""The command line: `python main_prune.py --config_path config.json`.

Exit codes: 0; 2 with one sentence per fault for what the user gave (configuration, data, checkpoint); 3 for a run that failed;
130 after Ctrl-C; 143 after SIGTERM, with the state saved.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from compress import __version__
from compress.config_file import load_config
from compress.errors import CompressError, Terminated


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help.\n")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    result = _Parser(prog="main_prune.py", description="Train or load a network, compress it, fine-tune it and report what it cost.", allow_abbrev=False)
    result.add_argument("--config_path", required=True, metavar="FILE", help="JSON configuration")
    result.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH.TO.KEY=VALUE",
                        help="override one setting; the value is JSON, or text; may be given several times")
    result.add_argument("--output_dir", default="runs", metavar="DIR", help="where the run folder is created (default: runs)")
    result.add_argument("--dry_run", action="store_true", help="print the plans' effect (widths, parameters, MACs) without training or writing")
    mode = result.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue a run; refuses to start one")
    mode.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    result.add_argument("--version", action="version", version=__version__)
    return result


class _Stopped(BaseException):
    """SIGTERM outside of a training; no `except Exception` on the way may take it for a fault of what was running."""


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C would; a training answers it itself (`compress.train.signals`)."""
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former if former is not None else signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        with _sigterm():
            return _main(arguments)
    except _Stopped:
        print("main_prune.py: SIGTERM was received; every finished stage is stored and the same command continues.", file=sys.stderr)
        return Terminated.exit_code


def _main(arguments: argparse.Namespace) -> int:
    try:
        config = load_config(arguments.config_path, arguments.overrides)
        from compress.pipeline.run import dry_run, run  # torch is imported only for a configuration that can be read

        if arguments.dry_run:
            dry_run(config)
        else:
            mode = "resume" if arguments.resume else "overwrite" if arguments.overwrite else "auto"
            run(config, Path(arguments.output_dir), mode)
    except CompressError as error:
        for fault in getattr(error, "faults", ()) or (str(error),):
            print(f"main_prune.py: {fault}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("main_prune.py: interrupted; the same command continues from the last checkpoint.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"main_prune.py: {error.filename or 'a file'} cannot be read or written: {error.strerror or error}.", file=sys.stderr)
        return 3
    return 0


