"""One entry of a run: a method at one ratio and seed, in one or several rounds of compression and fine-tuning.

A round cuts the network (score, allocate, surgery, BatchNorm recalibration) to its share of the way to the ratio and fine-tunes it; the last
one reaches the ratio. A method that gives capacity back (`regrow`) does so between rounds, followed by a fine-tuning of its own. Every
cut and every trained network is stored, so that a killed run goes on from the last one.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import methods
from compress.api import ranks, widths
from compress.config import Config
from compress.config_file import to_json
from compress.cost import count
from compress.curvature import local
from compress.data import DataBundle
from compress.errors import UserError
from compress.graph import trace
from compress.network_file import NETWORK, PLAN, WEIGHTS, read, read_weights, save
from compress.pipeline.checks import Prepared, context_for
from compress.pipeline.folder import digest
from compress.pipeline.stages import Base, Job, share
from compress.plan import Plan, apply_plan
from compress.report import entry_name as row_name
from compress.schedule import sparsity_at
from compress.train import evaluate, fit, recalibrate


@dataclass(frozen=True)
class Phase:
    """A change of the network that is followed by fine-tuning: a cut to `ratio`, or growth (`ratio` None)."""

    name: str
    ratio: float | None
    lr_factor: float = 1.0


def entry_name(config: Config, method: str, ratio: float, seed: int) -> str:
    """Folder name of an entry: `<method>-<budget><ratio>-s<seed>`."""
    return row_name({"method": method, "budget": config.prune.budget, "ratio": ratio, "seed": seed})


def phases(config: Config, method: str, ratio: float) -> list[Phase]:
    """The rounds of an entry in order."""
    chosen = methods.method(method)
    wanted = chosen.rounds(config.prune.method_options.get(method, {})) if hasattr(chosen, "rounds") else None
    rounds = wanted or config.prune.rounds
    result = []
    for number in range(1, rounds + 1):
        result.append(Phase(f"round{number}", sparsity_at(config.prune.schedule, number / rounds, ratio)))
        if number < rounds and hasattr(chosen, "regrow"):
            result.append(Phase(f"round{number}-growth", None, chosen.growth_lr_factor))
    return result


def entry_stage(job: Job, base: Base, method: str, ratio: float, seed: int) -> dict[str, Any]:
    """Compress, recalibrate, fine-tune and store one network; returns its measurements."""
    config, name = job.config, entry_name(job.config, method, ratio, seed)
    settings = to_json(config)
    shared = {k: v for k, v in settings["prune"].items() if k not in ("methods", "method_options", "ratios", "seeds")}
    key = digest("entry", base.key, shared, settings["prune"]["method_options"].get(method), settings["finetune"], method, ratio, seed)
    every = phases(config, method, ratio)
    done = share(job.dist, job.folder.result(name, key) if job.dist.is_main else None)
    if done is not None:
        _clean(job, name, every)
        job.log(f"{name}: done before, accuracy {done['accuracy']:.4f}")
        return done
    folder = job.folder.begin(name, key) if job.dist.is_main else job.folder.stage(name)
    model, plan, info = base.model, Plan(), {"history": [], "seconds": 0.0}
    for number, phase in enumerate(every):
        model, plan, info = _phase(job, base, _Entry(method, seed, name), phase, folder / phase.name, model, plan, info, number == len(every) - 1)
    result = {**info, "name": name, "key": key, "method": method, "ratio": ratio, "seed": seed}
    if job.dist.is_main:
        save(model, plan, folder, entry=name)
        job.folder.finish(name, key, result, [WEIGHTS, PLAN, NETWORK])
    _clean(job, name, every)
    return result


@dataclass(frozen=True)
class _Entry:
    method: str
    seed: int
    name: str


def _phase(job: Job, base: Base, entry: _Entry, phase: Phase, folder: Path, model: nn.Module, plan: Plan, info: dict[str, Any],
           last: bool) -> tuple[nn.Module, Plan, dict[str, Any]]:
    """Change the network, fine-tune it; the trained network, the plan so far, and what was measured so far."""
    config, cut, trained = job.config, folder / "cut", folder / "trained"
    if share(job.dist, _is_whole(trained) if job.dist.is_main else None):
        return _read(job, trained)
    if job.dist.is_main and not _is_whole(cut):
        _change(job, base, entry, phase, cut, model, plan, info)
    model, plan, info = _read(job, cut)
    where = entry.name if last and phase.name == "round1" else f"{entry.name}, {phase.name}"
    job.log(f"{where}: {info['params']:,} parameters, {info['macs']:,} MACs, accuracy {info['accuracy_oneshot']:.4f} before fine-tuning")
    if config.finetune.epochs:
        tuning = config.finetune.model_copy(update={"lr": config.finetune.lr * phase.lr_factor})
        epochs = fit(model, job.data, tuning, batch_size=tuning.batch_size or config.data.batch_size, seed=entry.seed, teacher=base.model if tuning.distill else None,
                     checkpoint=folder / "checkpoint" / "state.safetensors", log=job.log, distributed=job.dist, eval_batch_size=config.data.eval_batch_size)
        before = len(info["history"])
        info["history"] += [{**epoch, "epoch": before + epoch["epoch"]} for epoch in epochs]
        info["seconds"] += sum(epoch["seconds"] for epoch in epochs)
    info["accuracy"] = info["accuracy_oneshot"]
    if config.finetune.epochs and last:
        info["accuracy"] = evaluate(model, job.data.test, config.data.eval_batch_size)["accuracy"]
    if job.dist.is_main and not last:
        save(model, plan, trained, info=info)
    job.dist.barrier()
    return model, plan, info


@local()  # the other processes wait for the stored network and measure nothing
def _change(job: Job, base: Base, entry: _Entry, phase: Phase, folder: Path, model: nn.Module, plan: Plan, info: dict[str, Any]) -> None:
    """Cut or grow a copy of `model`, recalibrate it, and store it in `folder`."""
    config, chosen = job.config, methods.method(entry.method)
    example = job.prepared.example.to(job.dist.device)
    started = time.perf_counter()
    result = copy.deepcopy(model).eval()
    if phase.ratio is None:
        done = chosen.regrow(result, _context(job, entry, result, example), plan.meta)
        spent = 0.0
    else:
        context, state, spent = _scored(job, base, entry, model, example)
        started = time.perf_counter()
        done = methods.carry_out(entry.method, result, context, state, {config.prune.budget: phase.ratio})
    if config.prune.recalibration_images:
        images = job.data.calibration(config.prune.recalibration_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(entry.seed))
        recalibrate(result, images)
    spent += time.perf_counter() - started
    row, changed = effect(base.model, result, example)
    info = {**info, **row, "widths": changed, "ranks": ranks(result), "seconds": info["seconds"] + spent, "verified": done.meta.get("verified"),
            "accuracy_oneshot": evaluate(result, job.data.test, config.data.eval_batch_size)["accuracy"],
            "frozen": [name for name, parameter in result.named_parameters() if not parameter.requires_grad]}
    if chosen.by_channels:
        info |= {"pinned": dict(job.prepared.graph.pinned), "coverage": [row._asdict() for row in job.prepared.graph.coverage()]}
    elif "skipped" in done.meta:
        info["pinned"] = done.meta["skipped"]
    save(result, Plan(plan.steps + done.steps, done.meta), folder, info=info)


def _scored(job: Job, base: Base, entry: _Entry, model: nn.Module, example: torch.Tensor) -> tuple[Any, Any, float]:
    """Context, statistics and their seconds; those of the base network are measured once for all ratios."""
    key = entry.method, entry.seed
    if model is base.model and key in job.scores:
        return job.scores[key]
    started = time.perf_counter()
    context = _context(job, entry, model, example, job.prepared.graph if model is base.model else None)
    state = methods.method(entry.method).prepare(context)
    found = context, state, time.perf_counter() - started
    if model is base.model:
        job.scores[key] = found
    return found


def _context(job: Job, entry: _Entry, model: nn.Module, example: torch.Tensor, graph: Any = None) -> methods.Context:
    batches = calibration(job.config, job.data, entry.seed) if methods.needs_data(entry.method, job.config.prune.allocation) else []
    graph = graph or trace(model, example, exclude=tuple(job.config.prune.exclude))
    return context_for(job.config, model, graph, example, batches, entry.method, entry.seed, original=job.prepared.graph.count())


def _is_whole(folder: Path) -> bool:
    """Whether `folder` holds a stored network with what was measured on it, undamaged."""
    try:
        network, _, _ = read(folder)
    except UserError:
        return False
    return isinstance(network.get("info"), dict)


def _read(job: Job, folder: Path) -> tuple[nn.Module, Plan, dict[str, Any]]:
    """A stored network as every process goes on with it."""
    files = [(folder / name).read_bytes() if job.dist.is_main else None for name in (WEIGHTS, PLAN, NETWORK)]
    content, plan_text, network_text = (job.dist.share_bytes(file) for file in files)
    plan, info = Plan.from_json(plan_text.decode()), json.loads(network_text)["info"]
    model = copy.deepcopy(job.prepared.model)
    apply_plan(model, plan)
    read_weights(model, content, str(folder / WEIGHTS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in info["frozen"])
    return model.to(job.dist.device), plan, info


def plan_effect(config: Config, prepared: Prepared, data: DataBundle | None, method: str, ratio: float, seed: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """What a plan does to the network's size, without training: a partial row, and widths before and after."""
    batches = calibration(config, data, seed) if data is not None else []
    context = context_for(config, prepared.model, prepared.graph, prepared.example, batches, method, seed)
    chosen = methods.method(method)
    model = copy.deepcopy(prepared.model).eval()
    methods.carry_out(method, model, context, chosen.prepare(context), {config.prune.budget: ratio})
    return effect(prepared.model, model, prepared.example)


def effect(before: nn.Module, after: nn.Module, example: torch.Tensor) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Size of a compressed network beside the original: a partial row, and widths before and after."""
    old, new = count(before, example), count(after, example)
    a, b = widths(before), widths(after)
    row = {"params": new.params, "params_removed": 1 - new.params / old.params, "macs": new.macs, "macs_removed": 1 - new.macs / old.macs}
    return row, {name: (a[name], b.get(name, a[name])) for name in a}


def calibration(config: Config, data: DataBundle, seed: int) -> list[Any]:
    """The training images that statistics are measured on."""
    return data.calibration(config.prune.calibration_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(seed))


def _clean(job: Job, name: str, every: list[Phase]) -> None:
    """What a complete entry needs no more; runs after the entry is marked, so that a kill in between loses nothing."""
    if job.dist.is_main:
        for phase in every:
            shutil.rmtree(job.folder.stage(name) / phase.name, ignore_errors=True)
