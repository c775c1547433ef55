"""The run folder: one configuration, finished stages, and a lock against a second process.

A stage is a folder with `stage.json`, written last; it holds the hash of everything the stage depends on. A stage whose hash is not the
expected one is done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from compress.errors import RunError, UserError
from compress.files import read_json, write_json

RESOLVED, STAGE, LOCK = "resolved.json", "stage.json", ".lock"
Mode = Literal["auto", "resume", "overwrite"]


def digest(*parts: Any) -> str:
    """sha256 of JSON values in canonical form."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, in words, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
            if found:
                return found
        return None
    if old == new:
        return None
    return f"`{path}` is {json.dumps(old)} there and {json.dumps(new)} now"


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


class RunFolder:
    """`output_dir/name` of one configuration.

    Parameters
    ----------
    path:
        The folder; created by `open`.
    config:
        The complete configuration as JSON values.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config

    def check(self, mode: Mode) -> None:
        """Raise `UserError` where this configuration cannot use the folder; writes nothing."""
        exists = (self.path / RESOLVED).is_file()
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, expected a run folder; choose another `name` or --output_dir.")
        if mode == "resume" and not exists:
            raise UserError(f"--resume: {self.path} holds no run to continue; start it without --resume.")
        if not exists and self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise UserError(f"{self.path} holds files but no {RESOLVED}, so it is not a run folder; choose another `name` or --output_dir.")
        if exists and mode != "overwrite":
            found = difference(read_json(self.path / RESOLVED, "configuration of the earlier run"), self.config)
            if found:
                raise UserError(f"{self.path} holds a run of another configuration ({found}); give the run another `name`, or start over with --overwrite.")

    @contextlib.contextmanager
    def open(self, mode: Mode) -> Iterator[RunFolder]:
        """Lock the folder and write the configuration; with "overwrite" an earlier run in it is deleted first."""
        self.check(mode)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written: {error.strerror}; choose another --output_dir.") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"Another process is working in {self.path}; wait for it, or give this run another `name`.") from None
            if mode == "overwrite":
                # The configuration last: a kill in between leaves a folder that is still known as a run.
                for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == RESOLVED):
                    if entry.name != LOCK:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            if not (self.path / RESOLVED).is_file():
                write_json(self.path / RESOLVED, self.config)
            yield self
        finally:
            os.close(lock)

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name

    def result(self, name: str, key: str) -> Any | None:
        """What `finish` stored for this stage, or None where it is unfinished, damaged or depends on something else now."""
        try:
            stored = read_json(self.path / name / STAGE, "stage record")
        except UserError:
            return None
        if not isinstance(stored, dict) or stored.get("key") != key or "result" not in stored:
            return None
        files = stored.get("files", {})
        if not isinstance(files, dict) or any(_sha256(self.path / name / file) != expected for file, expected in files.items()):
            return None
        return stored["result"]

    def begin(self, name: str, key: str) -> Path:
        """The folder of a stage that is to be (re)done; what an earlier, different stage left there is removed."""
        folder = self.path / name
        marker = folder / "begun.json"
        try:
            same = read_json(marker, "stage marker") == {"key": key}
        except UserError:
            same = False
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(marker, {"key": key})
        (folder / STAGE).unlink(missing_ok=True)
        return folder

    def finish(self, name: str, key: str, result: Any, files: Iterable[str] = ()) -> Any:
        """Mark the stage as complete with its JSON `result`; without its `files` as they are now it counts as not done."""
        hashes = {file: _sha256(self.path / name / file) for file in files}
        try:
            write_json(self.path / name / STAGE, {"key": key, "result": result, "files": hashes})
        except ValueError as error:
            raise RunError(f"Stage {name} gave a value that is not a finite number: {error}.") from error
        return result
