"""Settings shared by the experiments on masks, and how they are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from compress.config import DataConfig, ModelConfig, Section, TrainConfig
from compress.config_file import apply_override
from compress.errors import UserError
from compress.files import read_json
from compress.masks import SCOPES
from compress.registry import nearest


class Experiment(Section):
    """What every experiment has."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="name of the run folder below the output directory")
    seeds: list[int] = Field([0], min_length=1, description="each run is done once per seed")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where there is one")
    data: DataConfig = Field(default_factory=DataConfig, description="data set")
    model: ModelConfig = Field(default_factory=ModelConfig, description="network")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training of the unpruned network where no weights are given")
    scope: Literal["conv", "conv+linear", "all-weights"] = Field("conv+linear", description=f"what masks may touch: {', '.join(SCOPES)}")
    exclude: list[str] = Field(default_factory=list, description="name patterns (fnmatch) of layers that stay dense")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("seeds holds the same value twice")
        return value


def one_of(value: str, known: Sequence[str], what: str) -> str:
    """`value`, or `ValueError` (a fault of the configuration) with the nearest of the known names."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}{nearest(value, list(known))}; known: {', '.join(known)}")
    return value


Kind = TypeVar("Kind", bound=Section)


def validate(kind: type[Kind], raw: dict[str, Any]) -> Kind:
    """`kind` from plain JSON values; `UserError` with one sentence per fault."""
    try:
        return kind.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise UserError(*(_sentence(kind, fault) for fault in error.errors())) from None


def _sentence(kind: type[Section], fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"]) or "the configuration"
    if fault["type"] == "extra_forbidden":
        known = list(kind.model_fields) if len(fault["loc"]) == 1 else []
        return f"`{path}` is not a setting{nearest(str(fault['loc'][-1]), known)}; the defaults are documented in {kind.__name__}."
    return f"`{path}` = {str(fault['input'])[:80]!r}: {fault['msg'].removeprefix('Value error, ')}."


def load_settings(kind: type[Kind], path: Path | str | None, overrides: Sequence[str] = (), flags: dict[str, Any] | None = None) -> Kind:
    """Settings from a JSON file (None: the defaults), then `flags` (nested, given ones only), then `path.to.key=value` overrides."""
    given = {} if path is None else read_json(Path(path), "configuration file")
    if not isinstance(given, dict):
        raise UserError(f"The configuration file {path} must hold a JSON object.")
    # An experiment's sections have defaults of their own, so that a section given in part must be laid over them.
    raw = kind().model_dump(mode="json", by_alias=True)
    _merge(raw, given)
    _merge(raw, _given(flags or {}))
    for override in overrides:
        apply_override(raw, override)
    return validate(kind, raw)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Without the flags that were not given (None)."""
    return {key: _given(value) if isinstance(value, dict) else value for key, value in flags.items() if value is not None}


def _merge(raw: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            _merge(raw[key], value)
        else:
            raw[key] = value


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all experiments share."""
    parser.add_argument("--config_path", type=Path, help="JSON file with what differs from the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting, such as data.name=cifar10")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="folder for the run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a run folder of another configuration")


def boolean(text: str) -> bool:
    """`true` or `false` as a flag's value; the published command lines read every non-empty text as true."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
