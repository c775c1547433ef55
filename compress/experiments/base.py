"""What every experiment does: load data, build and train networks, keep each finished run, write tables.

A run folder holds `resolved.json` (the settings), `runs/<key>.json` (one finished run each, complete or not there) and at the end
`results.json`, `results.csv` and `figures/`. The same command again skips what is there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.data import DataBundle, load_data
from compress.errors import CompressError, UserError
from compress.experiments.settings import Experiment
from compress.files import read_json, write_json, write_text
from compress.pipeline.checks import build_network, pick_device
from compress.siblings import own
from compress.train import evaluate, fit, recalibrate

Log = Callable[[str], None]


def say(line: str) -> None:
    """One line of progress to standard error."""
    sys.stderr.write(line + "\n")


def main_guard(run: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None = None) -> int:
    """Exit code of a command line: 0, or the code of a deliberate error, whose sentences go to standard error."""
    try:
        run(argv)
    except CompressError as error:
        say(str(error))
        return error.exit_code
    return 0


class RunFolder:
    """The folder of one experiment."""

    def __init__(self, parent: Path, settings: Experiment, overwrite: bool = False) -> None:
        self.path = Path(parent) / settings.name
        resolved = settings.model_dump(mode="json", by_alias=True)
        known = self.path / "resolved.json"
        if known.exists() and read_json(known) != resolved:
            if not overwrite:
                raise UserError(f"{self.path} holds a run of another configuration; choose another name, or --overwrite to replace it.")
            shutil.rmtree(self.path)
        write_json(known, resolved)

    def run(self, key: str, compute: Callable[[], dict[str, Any]], log: Log) -> dict[str, Any]:
        """The result of the run `key`: from its file, or computed and stored."""
        path = self.path / "runs" / f"{key}.json"
        if path.exists():
            return read_json(path)
        log(f"run {key}")
        result = compute()
        write_json(path, result)
        return result

    def write_rows(self, rows: Sequence[dict[str, Any]], **extra: Any) -> None:
        """`results.json` (rows and extra) and `results.csv` (the scalar fields of the rows)."""
        write_json(self.path / "results.json", {"rows": list(rows)} | extra)
        write_csv(self.path / "results.csv", rows)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The scalar fields of `rows` as CSV, one column per key in order of appearance; lists and objects are left out."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (list, dict))))
    lines = [",".join(columns)]
    lines += [",".join("" if row.get(key) is None else str(row[key]) for key in columns) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def device_of(settings: Experiment) -> torch.device:
    """The device that the settings ask for."""
    return pick_device(settings.device)


def data_of(settings: Experiment, seed: int) -> DataBundle:
    """The data set, on the device."""
    return load_data(settings.data, seed=seed, device=device_of(settings))


def fresh_model(settings: Experiment, data: DataBundle, seed: int) -> nn.Module:
    """The network with initial weights of this seed; the global random state is not changed.

    A network with the option `image_size` is built for the data set's images where the option is not given. Raises `UserError` for images
    that the network cannot take.
    """
    return build_network(settings.model, data.num_classes, data.input_shape, seed).to(device_of(settings))


def base_model(settings: Experiment, data: DataBundle, seed: int, folder: RunFolder, log: Log) -> nn.Module:
    """The unpruned network: `model.weights` where given, else trained once per seed (and kept in the run folder)."""
    model = fresh_model(settings, data, seed)
    if settings.model.weights is not None:
        own("models").load_weights(model, own("models").find_weights(settings.model.weights))
        return model
    parts = [settings.model_dump(mode="json")[key] for key in ("data", "model", "train")]
    key = hashlib.sha256(json.dumps([*parts, seed]).encode()).hexdigest()[:12]
    checkpoint = folder.path / "base" / f"s{seed}-{key}.safetensors"
    log(f"base network, seed {seed}")
    fit(model, data, settings.train, batch_size=settings.data.batch_size, seed=seed, checkpoint=checkpoint, log=log)
    return model


def accuracy(model: nn.Module, data: DataBundle, settings: Experiment) -> float:
    """Test accuracy in [0, 1], in evaluation mode."""
    return evaluate(model, data.test, settings.data.eval_batch_size)["accuracy"]


def recalibrated(model: nn.Module, data: DataBundle, images: int, seed: int, batch_size: int = 256) -> nn.Module:
    """A copy of the network with BatchNorm statistics measured on `images` training images."""
    twin = copy.deepcopy(model)
    recalibrate(twin, data.recalibration(images, batch_size, torch.Generator().manual_seed(seed)))
    return twin
