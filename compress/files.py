"""Files that are complete or not there: written to a temporary name in the same folder, fsynced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from compress.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader (or a crash) sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name per target: what a killed process left is overwritten by the next try, not collected.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is reported without a name
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused, since no other JSON reader takes them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "JSON file") -> Any:
    """Read a JSON file; a missing, unreadable or malformed one is a `UserError` naming `what` and the place of the fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise UserError(f"The {what} {path} does not exist.") from None
    except IsADirectoryError:
        raise UserError(f"The {what} {path} is a folder, expected a file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} {path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from None
    return parse_json(text, f"The {what} {path}")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly: a key given twice, NaN and infinities are faults."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise UserError(f"{where} holds the key {key!r} twice in one object; keep one.")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise UserError(f"{where} holds {name}, which is not JSON; write a finite number or null.")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} holds a number that cannot be read: {error}.") from None
