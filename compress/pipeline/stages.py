"""The two stages that train: the base network, and one entry (method, ratio, seed). Each is done once and stored."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import methods
from compress.api import widths
from compress.config import Config
from compress.config_file import to_json
from compress.cost import count
from compress.data import DataBundle
from compress.files import write_bytes
from compress.network_file import NETWORK, PLAN, WEIGHTS, read_weights, save, weights_to_bytes
from compress.pipeline.checks import Prepared, context_for
from compress.pipeline.folder import RunFolder, digest
from compress.plan import Plan, apply_plan
from compress.train import evaluate, fit, recalibrate
from compress.train.distributed import Dist

CUT = "cut"  # subfolder of an entry: the network after surgery, before fine-tuning


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


def entry_name(config: Config, method: str, ratio: float, seed: int) -> str:
    """Folder name of an entry: `<method>-<budget><ratio>-s<seed>`."""
    return f"{method}-{config.prune.budget}{ratio:g}-s{seed}"


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
            job.folder.finish("base", key, result)
    if job.dist.is_main:
        _clean(job.folder.stage("base"))
    content = job.dist.share_bytes((job.folder.stage("base") / WEIGHTS).read_bytes() if job.dist.is_main else None)
    read_weights(model, content, str(job.folder.stage("base") / WEIGHTS))
    job.log(f"base accuracy {result['accuracy']:.4f}")
    return Base(model.eval(), key, result)


def entry_stage(job: Job, base: Base, method: str, ratio: float, seed: int) -> dict[str, Any]:
    """Compress, recalibrate, fine-tune and store one network; returns its measurements."""
    config, name = job.config, entry_name(job.config, method, ratio, seed)
    settings = to_json(config)
    shared = {k: v for k, v in settings["prune"].items() if k not in ("methods", "method_options", "ratios", "seeds")}
    key = digest("entry", base.key, shared, settings["prune"]["method_options"].get(method), settings["finetune"], method, ratio, seed)
    done = share(job.dist, job.folder.result(name, key) if job.dist.is_main else None)
    if done is not None:
        if job.dist.is_main:
            _clean(job.folder.stage(name))
        job.log(f"{name}: done before, accuracy {done['accuracy']:.4f}")
        return done
    folder = job.folder.begin(name, key) if job.dist.is_main else job.folder.stage(name)
    if job.dist.is_main and not (folder / CUT / "model.json").is_file():
        _cut(job, base, method, ratio, seed, folder / CUT)
    model, plan, info = _read_cut(job, folder / CUT)
    job.log(f"{name}: {info['params']:,} parameters, {info['macs']:,} MACs, accuracy {info['accuracy_oneshot']:.4f} before fine-tuning")
    history = fit(model, job.data, config.finetune, batch_size=config.data.batch_size, seed=seed, teacher=base.model if config.finetune.distill else None,
                  checkpoint=folder / "checkpoint" / "state.safetensors", log=job.log, distributed=job.dist,
                          eval_batch_size=config.data.eval_batch_size) if config.finetune.epochs else []
    accuracy = evaluate(model, job.data.test, config.data.eval_batch_size)["accuracy"] if history else info["accuracy_oneshot"]
    result = {**info, "name": name, "key": key, "method": method, "ratio": ratio, "seed": seed, "accuracy": accuracy, "history": list(history),
              "seconds": info["seconds"] + sum(epoch["seconds"] for epoch in history)}
    if job.dist.is_main:
        save(model, plan, folder, entry=name)
        job.folder.finish(name, key, result)
        _clean(folder)
    return result


def plan_effect(config: Config, prepared: Prepared, data: DataBundle | None, method: str, ratio: float, seed: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """What a plan does to the network's size, without training: a partial row, and widths before and after."""
    batches = _calibration(config, data, seed) if data is not None else []
    context = context_for(config, prepared.model, prepared.graph, batches, method, seed)
    chosen = methods.method(method)
    model = copy.deepcopy(prepared.model).eval()
    chosen.apply(model, context, chosen.prepare(context), {config.prune.budget: ratio})
    return _effect(prepared.model, model, prepared.example)


def _effect(before: nn.Module, after: nn.Module, example: torch.Tensor) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    old, new = count(before, example), count(after, example)
    a, b = widths(before), widths(after)
    row = {"params": new.params, "params_removed": 1 - new.params / old.params, "macs": new.macs, "macs_removed": 1 - new.macs / old.macs}
    return row, {name: (a[name], b.get(name, a[name])) for name in a}


def _calibration(config: Config, data: DataBundle, seed: int) -> list[Any]:
    return data.calibration(config.prune.calibration_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(seed))


def _cut(job: Job, base: Base, method: str, ratio: float, seed: int, folder: Path) -> None:
    """Score (once per method and seed), allocate, cut, recalibrate; stores the network in `folder`."""
    config, chosen = job.config, methods.method(method)
    if (method, seed) not in job.scores:
        started = time.perf_counter()
        batches = _calibration(config, job.data, seed) if chosen.needs_data else []
        context = context_for(config, base.model, job.prepared.graph, batches, method, seed)
        state = chosen.prepare(context)
        job.scores[method, seed] = context, state, time.perf_counter() - started
    context, state, score_seconds = job.scores[method, seed]
    started = time.perf_counter()
    model = copy.deepcopy(base.model)
    plan = chosen.apply(model, context, state, {config.prune.budget: ratio})
    if config.prune.recalibration_images:
        images = job.data.calibration(config.prune.recalibration_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(seed))
        recalibrate(model, images)
    seconds = score_seconds + time.perf_counter() - started
    row, changed = _effect(base.model, model, job.prepared.example.to(job.dist.device))
    info = {**row, "widths": changed, "pinned": dict(job.prepared.graph.pinned), "coverage": [row._asdict() for row in job.prepared.graph.coverage()], "seconds": seconds,
            "accuracy_oneshot": evaluate(model, job.data.test, config.data.eval_batch_size)["accuracy"]}
    save(model, plan, folder, info=info)


def _read_cut(job: Job, folder: Path) -> tuple[nn.Module, Plan, dict[str, Any]]:
    """The network after surgery as every process starts to fine-tune it."""
    files = [(folder / name).read_bytes() if job.dist.is_main else None for name in (WEIGHTS, PLAN, NETWORK)]
    content, plan_text, network_text = (job.dist.share_bytes(file) for file in files)
    plan, info = Plan.from_json(plan_text.decode()), json.loads(network_text)["info"]
    model = copy.deepcopy(job.prepared.model)
    apply_plan(model, plan)
    read_weights(model, content, str(folder / WEIGHTS))
    return model.to(job.dist.device), plan, info


def _clean(folder: Path) -> None:
    """What a complete stage needs no more; runs after the stage is marked, so that a kill in between loses nothing."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    shutil.rmtree(folder / CUT, ignore_errors=True)


def share(dist: Dist, value: Any) -> Any:
    """The JSON value of rank 0, on every process."""
    return json.loads(dist.share_bytes(json.dumps(value).encode() if dist.is_main else None))


def state_hash(model: nn.Module) -> str:
    """sha256 of all parameters and buffers."""
    return hashlib.sha256(weights_to_bytes(model)).hexdigest()

