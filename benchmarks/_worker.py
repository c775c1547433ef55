"""Runs the cases of a benchmark in a process of their own, so that what breaks the GPU's context (an illegal address, a capture that cannot be
ended) or kills the process loses one case.

The process is kept from case to case, because starting one takes seconds, and replaced after any failure.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Case = Callable[[dict[str, Any]], dict[str, Any]]


def failure_line(failure: BaseException) -> str:
    """The first line of what an exception says, with its type."""
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first}" if first else type(failure).__name__


def guarded(case: Case, job: dict[str, Any]) -> dict[str, Any]:
    """The case's result, or {"failed": reason} where it raised."""
    try:
        return case(job)
    except Exception as failure:
        return {"failed": failure_line(failure)}


def serve(connection: Connection, case: Case) -> None:
    """Answers each job of the connection with the case's result or {"failed": reason}, until there are no more."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(guarded(case, job))


class Worker:
    """`run` gives a case's result, {"failed": reason} where it raised, ended the process or took longer than `seconds`."""

    def __init__(self, case: Case, seconds: float) -> None:
        self.case, self.seconds = case, seconds
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=serve, args=(theirs, self.case), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(job)
            if not self._connection.poll(self.seconds):
                result = {"failed": f"took longer than {self.seconds:g} seconds"}
            else:
                result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            result = {"failed": f"ended the process (exit code {self._process.exitcode})"}
        if "failed" in result or any("failed" in side for side in result.values() if isinstance(side, dict)):
            self.close()
        return result

    def close(self) -> None:
        """Ends the process; the next case starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None
