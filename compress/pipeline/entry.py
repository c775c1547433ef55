"""One entry of a run: a method at one ratio and seed, in one or several rounds of compression and fine-tuning.

A round cuts the network (score, allocate, surgery, BatchNorm recalibration) to its share of the way to the ratio and fine-tunes it; the last
one reaches the ratio. A method that gives capacity back (`regrow`) does so between rounds, followed by a fine-tuning of its own. Rounds
of a fixed size (`stepwise`) end with the one that meets the ratio; where none does, the log says what was reached. Every cut and every
trained network is stored, so that a killed run goes on from the last one.
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
from compress.errors import Unreachable, UserError
from compress.graph import trace
from compress.network_file import NETWORK, PLAN, WEIGHTS, read, read_weights, save
from compress.pipeline.checks import Prepared, context_for
from compress.pipeline.folder import digest
from compress.pipeline.phases import Phase, phases
from compress.pipeline.stages import Base, Job, share
from compress.plan import Plan, apply_plan
from compress.report import entry_name as row_name
from compress.reconstruct import reconstruct
from compress.train import evaluate, fit, recalibrate


def entry_name(config: Config, method: str, ratio: float, seed: int) -> str:
    """Folder name of an entry: `<method>-<budget><ratio>-s<seed>`."""
    return row_name({"method": method, "budget": config.prune.budget, "ratio": ratio, "seed": seed})


def entry_stage(job: Job, base: Base, method: str, ratio: float, seed: int) -> dict[str, Any]:
    """Compress, recalibrate, fine-tune and store one network; returns its measurements. `Unreachable`, on every process: a budget that is measured cannot be met here."""
    config, name = job.config, entry_name(job.config, method, ratio, seed)
    settings = to_json(config)
    shared = {k: v for k, v in settings["prune"].items() if k not in ("methods", "method_options", "ratios", "seeds")}
    clock = [settings["benchmark"]] if config.prune.budget == "latency" else []
    key = digest("entry", base.key, shared, settings["prune"]["method_options"].get(method), settings["finetune"], method, ratio, seed, *clock)
    every = phases(config, method, ratio)
    done = share(job.dist, job.folder.result(name, key) if job.dist.is_main else None)
    if done is not None:
        _clean(job, name, every)
        job.log(f"{name}: done before, accuracy {done['accuracy']:.4f}")
        return done
    folder = job.folder.begin(name, key) if job.dist.is_main else job.folder.stage(name)
    model, plan, info = base.model, Plan(), {"history": [], "seconds": 0.0}
    for number, phase in enumerate(every):
        model, plan, info, last = _phase(job, base, _Entry(method, seed, name), phase, folder / phase.name, model, plan, info, number == len(every) - 1)
        if last:
            break
    if "missing" in plan.meta:
        job.log(f"{name}: the rounds ended with {info[f'{config.prune.budget}_removed']:.1%} of the {config.prune.budget} removed, before the ratio of {ratio:g}")
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
           last: bool) -> tuple[nn.Module, Plan, dict[str, Any], bool]:
    """Change the network, fine-tune it; the trained network, the plan so far, what was measured so far, and whether the rounds end here."""
    config, cut, trained = job.config, folder / "cut", folder / "trained"
    if share(job.dist, _is_whole(trained) if job.dist.is_main else None):
        return *_read(job, trained), False
    refused = None
    if job.dist.is_main and not _is_whole(cut):
        try:
            _change(job, base, entry, phase, cut, model, plan, info)
        except Unreachable as error:
            refused = str(error)
    refused = share(job.dist, refused)
    if refused:
        raise Unreachable(refused)
    model, plan, info = _read(job, cut)
    last = last or phase.ends(plan)
    where = entry.name if last and phase.name == "round1" else f"{entry.name}, {phase.name}"
    job.log(f"{where}: {info['params']:,} parameters, {info['macs']:,} MACs{saved_latency(info)}, accuracy {info['accuracy_oneshot']:.4f} before fine-tuning")
    if config.finetune.epochs:
        tuning = phase.tuning(config.finetune)
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
    return model, plan, info, last


def saved_latency(info: dict[str, Any]) -> str:
    """What a budget of latency came to, for the log; empty for other budgets."""
    found = info.get("latency")
    return f", {found['saved']:.1%} of the latency saved at batch {found['batch_size']}" if found else ""


@local()  # the other processes wait for the stored network and measure nothing
def _change(job: Job, base: Base, entry: _Entry, phase: Phase, folder: Path, model: nn.Module, plan: Plan, info: dict[str, Any]) -> None:
    """Cut or grow a copy of `model`, recalibrate it, and store it in `folder`."""
    config, chosen = job.config, methods.method(entry.method)
    example = job.prepared.example.to(job.dist.device)
    started = time.perf_counter()
    result = copy.deepcopy(model).eval()
    if phase.ratio is None:
        context, state, spent = _context(job, base.model, entry, model, example, plan.meta), None, 0.0
    else:
        context, state, spent = _scored(job, base, entry, model, example, plan.meta)
        started = time.perf_counter()
    done = phase.change(entry.method, result, context, state, config.prune.budget)
    if config.prune.reconstruction_images:
        images = job.data.calibration(config.prune.reconstruction_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(entry.seed))
        reconstruct(result, base.model, plan.steps + done.steps, images, example, exclude=config.prune.exclude)
    if config.prune.recalibration_images:
        images = job.data.recalibration(config.prune.recalibration_images, config.prune.calibration_batch_size, torch.Generator().manual_seed(entry.seed))
        recalibrate(result, images)
    spent += time.perf_counter() - started
    row, changed = effect(base.model, result, example)
    info = {**info, **row, "widths": changed, "ranks": ranks(result), "seconds": info["seconds"] + spent, "verified": done.meta.get("verified"), "latency": done.meta.get("latency"),
            "accuracy_oneshot": evaluate(result, job.data.test, config.data.eval_batch_size)["accuracy"],
            "frozen": [name for name, parameter in result.named_parameters() if not parameter.requires_grad]}
    if chosen.by_channels:
        info |= {"pinned": dict(job.prepared.graph.pinned), "coverage": [row._asdict() for row in job.prepared.graph.coverage()]}
    elif "skipped" in done.meta:
        info["pinned"] = done.meta["skipped"]
    save(result, Plan(plan.steps + done.steps, done.meta), folder, info=info)


def _scored(job: Job, base: Base, entry: _Entry, model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> tuple[Any, Any, float]:
    """Context, statistics and their seconds; those of the base network are measured once for all ratios."""
    key = entry.method, entry.seed
    if model is base.model and key in job.scores:
        return job.scores[key]
    started = time.perf_counter()
    context = _context(job, base.model, entry, model, example, meta, job.prepared.graph if model is base.model else None)
    state = methods.method(entry.method).prepare(context)
    found = context, state, time.perf_counter() - started
    if model is base.model:
        job.scores[key] = found
    return found


def _context(job: Job, base: nn.Module, entry: _Entry, model: nn.Module, example: torch.Tensor, meta: dict[str, Any], graph: Any = None) -> methods.Context:
    batches = calibration(job.config, job.data, entry.seed) if methods.needs_data(entry.method, job.config.prune.allocation) else []
    graph = graph or trace(model, example, exclude=tuple(job.config.prune.exclude))
    return context_for(job.config, model, graph, example, batches, entry.method, entry.seed, original=job.prepared.graph.count(), meta=meta,
                       uncompressed=base)


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


def plan_effect(config: Config, prepared: Prepared, data: DataBundle | None, method: str, ratio: float, seed: int) -> tuple[dict[str, Any], nn.Module]:
    """What the rounds of an entry do to the network's size, without training: a partial row with `widths`, and the network."""
    batches = calibration(config, data, seed) if data is not None else []
    chosen, original, model, graph, plan = methods.method(method), prepared.graph.count(), prepared.model, prepared.graph, Plan()
    for phase in phases(config, method, ratio):
        graph = graph if model is prepared.model else trace(model, prepared.example, exclude=tuple(config.prune.exclude))
        context = context_for(config, model, graph, prepared.example, batches, method, seed, original, plan.meta, prepared.model)
        state = None if phase.ratio is None else chosen.prepare(context)
        model = copy.deepcopy(model).eval()
        plan = phase.change(method, model, context, state, config.prune.budget)
        if phase.ends(plan):
            break
    row, changed = effect(prepared.model, model, prepared.example)
    return row | {"widths": changed, "latency": plan.meta.get("latency")}, model


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
