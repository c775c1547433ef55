"""Structured and low-rank compression of trained PyTorch networks.

`compress(model, example_inputs, ...)` returns a smaller copy of a network, the plan of what was done and a report; `save` and `load`
keep it on disk. The command line is `compress.cli`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["compress", "load", "save"]


def __getattr__(name: str) -> Any:
    """Import torch only when something of it is used: a faulty configuration is reported before that."""
    if name == "compress":
        from compress.api import compress as item
    elif name in ("save", "load"):
        from compress import network_file

        item = getattr(network_file, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = item
    return item
