"""The base network: trained, or given; and what all stages share."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.config import Config
from compress.config_file import to_json
from compress.data import DataBundle
from compress.files import write_bytes
from compress.network_file import WEIGHTS, read_weights, weights_to_bytes
from compress.pipeline.checks import Prepared
from compress.pipeline.folder import RunFolder, digest
from compress.train import evaluate, fit
from compress.train.distributed import Dist

@dataclass
class Job:
    """What every stage needs."""

    config: Config
    folder: RunFolder
    data: DataBundle
    prepared: Prepared
    dist: Dist
    log: Callable[[str], None]
    scores: dict[tuple[str, int], tuple[Any, Any, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The unpruned network with what was measured on it."""

    model: nn.Module
    key: str
    result: dict[str, Any]


def base_stage(job: Job) -> Base:
    """Train the network, or take the given weights; the result is the starting point of every entry."""
    config = job.config
    settings = to_json(config)
    weights = config.model.weights
    parts = [settings["data"], settings["model"], settings["seed"], settings["deterministic"]]
    parts += [state_hash(job.prepared.model)] if weights is not None else [settings["train"]]
    key = digest("base", *parts)
    result = share(job.dist, job.folder.result("base", key) if job.dist.is_main else None)
    model = copy.deepcopy(job.prepared.model).to(job.dist.device)
    if result is None:
        history = []
        folder = job.folder.begin("base", key) if job.dist.is_main else job.folder.stage("base")
        if weights is None:
            job.log(f"training the base network for {config.train.epochs} epochs")
            history = fit(model, job.data, config.train, batch_size=config.data.batch_size, seed=config.seed,
                          checkpoint=folder / "checkpoint" / "state.safetensors", log=job.log, distributed=job.dist,
                          eval_batch_size=config.data.eval_batch_size)
        accuracy = evaluate(model, job.data.test, config.data.eval_batch_size)["accuracy"]
        result = {"accuracy": accuracy, "history": list(history), "seconds": sum(epoch["seconds"] for epoch in history)}
        if job.dist.is_main:
            write_bytes(folder / WEIGHTS, weights_to_bytes(model))
            job.folder.finish("base", key, result, [WEIGHTS])
    if job.dist.is_main:
        # After the stage is marked, so that a kill in between loses nothing.
        shutil.rmtree(job.folder.stage("base") / "checkpoint", ignore_errors=True)
    content = job.dist.share_bytes((job.folder.stage("base") / WEIGHTS).read_bytes() if job.dist.is_main else None)
    read_weights(model, content, str(job.folder.stage("base") / WEIGHTS))
    job.log(f"base accuracy {result['accuracy']:.4f}")
    # Entries depend on the weights themselves: a base trained again elsewhere may differ in its last bits.
    return Base(model.eval(), digest(key, hashlib.sha256(content).hexdigest()), result)


def share(dist: Dist, value: Any) -> Any:
    """The JSON value of rank 0, on every process."""
    return json.loads(dist.share_bytes(json.dumps(value).encode() if dist.is_main else None))


def state_hash(model: nn.Module) -> str:
    """sha256 of all parameters and buffers."""
    return hashlib.sha256(weights_to_bytes(model)).hexdigest()

