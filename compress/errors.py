"""The errors that this toolkit raises on purpose.

Each message is one sentence: what was given, what was expected, where, and what to do. The command line prints the sentence and
leaves with the error's `exit_code`; a traceback is printed only for faults of the toolkit itself.
"""


def cause(error: BaseException) -> str:
    """The first line of what an exception of somebody else's says, without a full stop; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class CompressError(Exception):
    """Base class; `exit_code` is what the command line returns."""

    exit_code = 3


class UserError(CompressError, ValueError):
    """A fault in what the user gave: configuration, data set, checkpoint, argument. Exit code 2.

    `faults` holds one sentence per fault; several faults are reported together.
    """

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class RunError(CompressError, RuntimeError):
    """A run that started correctly and could not go on (non-finite loss, lost device, full disk). Exit code 3."""


class Unreachable(RunError):
    """One entry of a run that this device does not allow, found out by measuring; the other entries go on. Exit code 3 at the end."""


class Terminated(CompressError):
    """SIGTERM was received; the state was saved and the same command continues. Exit code 143."""

    exit_code = 143
