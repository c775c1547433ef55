"""Everything about a configuration that can be found out before anything is written or trained."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import methods
from compress.config import Config, ModelConfig
from compress.data import describe
from compress.errors import CompressError, UserError, cause
from compress.graph import ChannelGraph, trace
from compress.methods import Context
from compress.methods.timing import Timing
from compress.pipeline.phases import phases
from compress.siblings import own
from compress.train.modes import mode
from compress.undisturbed import undisturbed


@dataclass(frozen=True)
class Prepared:
    """An untrained (or loaded) network that fits the data, with its channel graph."""

    model: nn.Module
    graph: ChannelGraph
    example: Tensor
    num_classes: int


RESERVED = ("name", "num_classes", "in_channels")  # arguments of the builder that the toolkit gives itself


def build_network(config: ModelConfig, num_classes: int, shape: tuple[int, int, int], seed: int) -> nn.Module:
    """The uncompressed network with initial weights drawn from `seed`; the global random state is not touched.

    `shape` is that of the images (C, H, W). A network that needs to know their side (option `image_size`) is told it.
    """
    for key in RESERVED:
        if key in config.options:
            raise UserError(f"`model.options.{key}`: {key} is set by the toolkit; remove it from the options.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.import_ is not None:
            return _imported(config, num_classes)
        if config.name is None:
            raise UserError("`model`: give a `name` of the registry or an `import` of your own network.")
        try:
            options = dict(config.options)
            if "image_size" not in options and "image_size" in own("models").info(config.name, **options).options:
                options["image_size"] = shape[1]
            facts = own("models").info(config.name, **options)
            if min(shape[1:]) < facts.min_size or (facts.exact_size and set(shape[1:]) != {facts.exact_size}):
                wanted = f"of side {facts.exact_size}" if facts.exact_size else f"of at least {facts.min_size} pixels a side"
                raise UserError(f"{config.name} takes images {wanted}, and the data has {shape[1]}x{shape[2]}.")
            return own("models").build(config.name, num_classes, in_channels=shape[0], **options)
        except UserError as error:
            raise UserError(*(f"`model`: {fault}" for fault in error.faults)) from None


def _imported(config: ModelConfig, num_classes: int) -> nn.Module:
    module_name, function_name = str(config.import_).split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard leaves by itself
        raise UserError(f"`model.import`: module {module_name!r} cannot be imported ({type(error).__name__}: {_line(error)}).") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"`model.import`: module {module_name!r} has no {function_name!r}.")
    try:
        model = function(num_classes=num_classes, **config.options)
    except (Exception, SystemExit) as error:
        raise UserError(f"`model.import`: {config.import_} failed with num_classes={num_classes} and the options ({type(error).__name__}: {_line(error)}).") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"`model.import`: {config.import_} returned {type(model).__name__}, expected a torch.nn.Module.")
    return model


def pick_device(name: str) -> torch.device:
    """The torch device of `device`; "auto" is a GPU where there is one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"`device` = \"{name}\": torch sees no GPU here; use \"cpu\" or \"auto\".")
    device = torch.device("cuda" if name == "auto" else name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"`device` = \"{name}\": torch sees {torch.cuda.device_count()} GPUs here.")
    return device


def check(config: Config) -> Prepared:
    """Build the network and try everything on one image of zeros.

    Raises
    ------
    UserError
        One sentence per fault: unknown model, method or option, images that the network cannot take, a budget that no plan reaches.
    """
    faults = _method_faults(config)
    try:
        num_classes, shape = describe(config.data)
        model = build_network(config.model, num_classes, shape, config.seed)
    except UserError as error:
        raise UserError(*faults, *error.faults) from None
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    faults += _forward_faults(config, model, num_classes, shape)
    if faults:
        raise UserError(*faults)
    if config.model.weights is not None:
        own("models").load_weights(model, config.model.weights)
    graph = trace(model, example, exclude=tuple(config.prune.exclude))
    for name in config.prune.methods:
        context = context_for(config, model, graph, example, [], name, 0)
        for ratio in config.prune.ratios:
            chosen, cuts = methods.method(name), [phase.ratio for phase in phases(config, name, ratio) if phase.ratio is not None]
            try:
                if hasattr(chosen, "check_rounds"):
                    chosen.check_rounds(context, config.prune.budget, cuts)
                else:
                    chosen.check_budget(context, {config.prune.budget: ratio})
            except UserError as error:
                faults += [f"`prune.ratios`, method {name!r}: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return Prepared(model, graph, example, num_classes)


def _forward_faults(config: Config, model: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> list[str]:
    """Why the network cannot be evaluated, trained, copied or stored; it is left as it was, but for lazy parameters that now have a shape."""
    name, images = _name(config.model), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    doing = "evaluation"
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for count in (1, 2):
                with mode(model, False):
                    outputs = model(images[:count])
                if not isinstance(outputs, Tensor) or outputs.shape != (count, num_classes):
                    got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                    return [f"`model`: {name} returns {got} for {count} image(s), expected [{count}, {num_classes}]."]
            doing = "training"
            with undisturbed(model):
                model.train()
                model(images)
    except Exception as error:
        return [f"`model`: {name} cannot take the {'x'.join(map(str, shape))} images of {config.data.name} ({doing}: {_line(error)})."]
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            return [f"`model`: {name} keeps {key!r} in its state_dict, which is no tensor ({type(value).__name__}) and cannot be stored."]
    try:
        copy.deepcopy(model)
    except Exception as error:
        return [f"`model`: {name} cannot be copied ({_line(error)})."]
    return []


def context_for(
    config: Config, model: nn.Module, graph: ChannelGraph, example: Tensor, batches: list[tuple[Tensor, Tensor]], method: str, seed: int,
    original: tuple[int, int] | None = None, meta: dict[str, Any] | None = None, uncompressed: nn.Module | None = None) -> Context:
    """What `method` is given under this configuration."""
    prune = config.prune
    timing = None
    if prune.budget == "latency":
        images = torch.randn(prune.latency_batch_size, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
        timing = Timing(images, config.benchmark.seconds, config.benchmark.threads)
    return Context(
        model=model, graph=graph, example=example, batches=batches, loss_fn=F.cross_entropy, generator=torch.Generator().manual_seed(seed),
        original=original, exclude=tuple(prune.exclude),
        allocation=prune.allocation, max_layer_ratio=prune.max_layer_ratio, round_to=prune.round_to, verify=prune.verify,
        options=prune.method_options.get(method, {}), meta=meta or {}, uncompressed=uncompressed, timing=timing)


def _method_faults(config: Config) -> list[str]:
    faults = []
    prune = config.prune
    for index, name in enumerate(prune.methods):
        try:
            method = methods.method(name)
            if prune.budget not in method.budgets:
                faults.append(f"`prune.budget` = {prune.budget!r}: method {name!r} takes {' or '.join(method.budgets)}.")
            method.check(prune.method_options.get(name, {}))
            methods.check_allocation(name, prune.allocation)
            methods.check_rounding(name, prune.round_to)
            if prune.reconstruction_images and method.budgets == ("weights",):
                faults.append(f"`prune.reconstruction_images`: method {name!r} makes masks, whose zeros reconstruction would not keep; set it to 0.")
        except UserError as error:
            faults += [f"`prune.methods[{index}]`: {fault}" for fault in error.faults]
    faults += [f"`prune.method_options.{name}`: method {name!r} is not in prune.methods." for name in prune.method_options if name not in prune.methods]
    return faults


def _name(config: ModelConfig) -> str:
    return config.import_ or str(config.name)


def _line(error: BaseException) -> str:
    if isinstance(error, CompressError):
        return str(error)
    return cause(error)
