"""From a configuration file and `--set` overrides to a validated `Config`; every fault becomes one sentence."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.config import Config
from compress.errors import UserError
from compress.files import parse_json, read_json
from compress.registry import nearest


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `overrides` ("path.to.key=value", the value as JSON or else as text) and validate.

    Raises
    ------
    UserError
        With one sentence per fault.
    """
    raw = read_json(Path(path), "configuration file")
    if not isinstance(raw, dict):
        raise UserError(f"The configuration file {path} must hold a JSON object, got {_kind(raw)}.")
    for override in overrides or []:
        apply_override(raw, override)
    return validate(raw)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one nested key of `raw` in place from "path.to.key=value"."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r}: expected path.to.key=value, such as --set train.epochs=5.")
    try:
        value = parse_json(text, f"--set {path}")
    except UserError as error:
        if "not valid JSON" not in str(error):
            raise
        value = text
    node = raw
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:  # an optional section that is switched off: setting a key inside switches it on
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: `{'.'.join(keys[: depth + 1])}` holds {_kind(child)}, not an object with keys.")
        node = child
    node[keys[-1]] = value


def validate(raw: dict[str, Any]) -> Config:
    """`Config` from plain JSON values; all faults are reported together."""
    try:
        return Config.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise UserError(*dict.fromkeys(_sentence(fault) for fault in error.errors())) from None


def _sentence(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in location).lstrip(".") or "the configuration"
    if fault["type"] == "extra_forbidden":
        known = _keys(location[:-1])
        where = f"in `{'.'.join(location[:-1])}`" if location[:-1] else "at the top level"
        return f"`{path}` is not a setting{nearest(location[-1], known)}; known {where}: {', '.join(known)}."
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    message = message.replace("a valid array", "a list")
    if fault["type"] in ("model_type", "model_attributes_type"):
        message = "input should be an object with keys"
    if fault["type"] == "string_pattern_mismatch" and path == "name":
        message = "a run name has letters, digits, dots, dashes and underscores, and starts with a letter or digit"
    given = fault["input"]
    shown = "" if isinstance(given, dict) else f" = {_short(given)}"
    return f"`{path}`{shown}: {message}."


def _keys(location: list[str]) -> list[str]:
    """The valid keys of the section at `location`."""
    section: Any = Config
    for part in location:
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            return []
        section = next((t for t in (field.annotation, *typing.get_args(field.annotation)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
    return [field.alias or name for name, field in section.model_fields.items()] if section is not None else []


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def to_json(config: Config) -> dict[str, Any]:
    """The complete configuration as plain JSON values, as written to resolved.json."""
    return config.model_dump(mode="json", by_alias=True)
