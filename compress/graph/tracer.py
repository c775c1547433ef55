"""`trace`: runs a network once and returns its channel graph."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.arguments import empty, unusable
from compress.errors import RunError, UserError
from compress.graph import rules_conv, rules_elementwise, rules_linear, rules_reduce, rules_shape, rules_split  # noqa: F401
from compress.graph.adapters import on_enter
from compress.graph.channel_graph import ChannelGraph
from compress.graph.copies import as_arguments, meta_copy, quiet, real_copy, to_meta
from compress.graph.groups import ChannelGroup, solve
from compress.graph.mode import LabelMode, Trace
from compress.graph.probe import probe_shapes, probe_values
from compress.graph.verify import Verdict, one_line
from compress.surgery import named_tensors

ROUNDS = 12
Pin = tuple[str, int, Tensor, str]


def trace(model: nn.Module, example_inputs: Any, *, exclude: Sequence[str] = (), probe: bool = True) -> ChannelGraph:
    """Finds which parameter slices belong together.

    Parameters
    ----------
    model: any network; it stays as it is (mode, buffers, gradients, random state).
    example_inputs: a tensor, or a tuple of positional arguments.
    exclude: name patterns (fnmatch) of modules or parameters that stay as they are.
    probe: try out what the program's constants allow, so that a group listed as prunable is one (`compress.graph.probe`).

    Raises UserError where an exclude pattern matches nothing, RunError where the network cannot be run on the example.
    """
    _refuse(model)
    if reason := empty(example_inputs):
        raise UserError(reason)
    inputs = as_arguments(example_inputs)
    excluded = {name: f"excluded by {pattern!r}" for name, pattern in _excluded(model, exclude).items()} | _aliases(model)
    skeleton, choices, pins = meta_copy(model), {}, []  # type: ignore[var-annotated]
    runnable, arguments = skeleton, to_meta(inputs)
    try:
        graph = _once(skeleton, skeleton, arguments, inputs, excluded, choices, pins)
    except Exception:
        runnable, arguments = real_copy(model), inputs
        try:
            graph = _once(runnable, skeleton, arguments, inputs, excluded, choices, pins)
        except Exception as error:
            raise RunError(f"The network could not be run on the example inputs: {one_line(error)}.") from error
    graph = _reread(graph, choices, lambda: _once(runnable, skeleton, arguments, inputs, excluded, choices, pins))
    for _ in range(ROUNDS if probe else 0):
        failed, suspects = probe_shapes(graph, runnable, arguments)
        failed = failed if failed or suspects else probe_values(graph, model)
        if not failed and not suspects:
            break
        choices.update({assumption.site: assumption.choice + 1 for assumption in suspects})
        _narrow(graph, failed, choices, pins)
        graph = _once(runnable, skeleton, arguments, inputs, excluded, choices, pins)
    return graph


def _reread(graph: ChannelGraph, choices: dict[tuple[int, int], int], again: Callable[[], ChannelGraph]) -> ChannelGraph:
    """Takes another reading of the guesses whose channels are pinned anyway, and keeps those readings that set channels free.

    `view(n, c, r, r, h, w)` of a pixel shuffle is first read as r positions that go together, which makes an image side removable; the
    other reading is c blocks.
    """
    for further in (1, 2):
        stuck = {a.site: a.choice for a in graph.assumptions if a.choice + further < a.options - 1 and not graph.free(a.atoms)}
        if not stuck:
            break
        choices.update({site: choice + further for site, choice in stuck.items()})
        tried = again()
        freed = {assumption.site for assumption in tried.assumptions if tried.free(assumption.atoms)}
        choices.update({site: choice for site, choice in stuck.items() if site not in freed})
        graph = again() if freed & set(stuck) else graph
    return graph


def _narrow(graph: ChannelGraph, failed: dict[ChannelGroup, Verdict], choices: dict[tuple[int, int], int], pins: list[Pin]) -> None:
    """Takes the next reading of every guess that a failed group went through; without one the group is pinned."""
    for group, verdict in failed.items():
        own, moved = set(group.components.tolist()), False
        for assumption in graph.assumptions:
            if assumption.choice < assumption.options - 1 and own & set(graph.component_of(assumption.atoms).tolist()):
                choices[assumption.site], moved = assumption.choice + 1, True
        if not moved:
            pins += [(member.parameter, member.dim, member.indices.flatten(), verdict.problem) for member in group.members[:1]]


def _refuse(model: nn.Module) -> None:
    """UserError for wrappers that cannot be copied and cut."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise UserError(f"A network wrapped in {type(model).__name__} cannot be traced; give the network inside it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("A scripted network cannot be traced; give the nn.Module that it was made from.")
    if reason := unusable(model):
        raise UserError(reason)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Tensors that start at the same address as another one without being the same object."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        if tensor.numel() and not tensor.is_meta:
            other = first.setdefault(tensor.data_ptr(), name)
            if other != name:
                found.update({name: f"shares its memory with {other!r}", other: f"shares its memory with {name!r}"})
    return found


def _excluded(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Tensor name -> the pattern that excludes it."""
    found: dict[str, str] = {}
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    tensors = list(named_tensors(model))
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        roots = [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
        hits = [name for name in tensors if fnmatch.fnmatchcase(name, pattern) or any(name.startswith(f"{root}.") for root in roots)]
        if not hits and not roots:
            raise UserError(f"The exclude pattern {pattern!r} matches no module and no parameter of the network.")
        found.update({name: pattern for name in hits if name not in found})
    return found


@contextmanager
def _stack(model: nn.Module, state: Trace) -> Iterator[None]:
    """Keeps `state.stack` at the running modules by hooks on the copy; they are taken off again."""
    handles = []
    for name, module in model.named_modules():
        def enter(module: nn.Module, args: tuple, name: str = name) -> None:
            state.stack.append((name, module))
            on_enter(state, name, module, args)

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            state.stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _once(runnable: nn.Module, skeleton: nn.Module, arguments: tuple, inputs: tuple, excluded: dict[str, str],
          choices: dict[tuple[int, int], int], pins: list[Pin]) -> ChannelGraph:
    """One run under the dispatch mode with the given readings of the program's constants."""
    state = Trace(choices)
    tensors, owned = named_tensors(runnable), {}
    for name, tensor in tensors.items():
        dims = state.atoms.own(name, tuple(tensor.shape))
        state.set(tensor, dims, name)  # type: ignore[arg-type]
        owned[name] = (tuple(tensor.shape), dims)
        if name in excluded:
            for atoms in dims.values():
                state.atoms.pin(atoms, excluded[name])
    for name, dim, indices, reason in pins:
        state.atoms.pin(owned[name][1][dim][indices.numpy()], reason)
    _watch(runnable, arguments, state)
    costs = list(state.costs)
    if runnable is skeleton and set(dict(runnable.named_parameters())) - state.touched:
        _watch_training(runnable, arguments, state)
    state.costs = costs
    for name, tensor in tensors.items():
        for dim, atoms in owned[name][1].items():
            current = state.of(tensor).dims.get(dim)
            if current is None or current is not atoms:
                state.atoms.pin(atoms, "is overwritten while the network runs")
    parameters = dict(runnable.named_parameters())
    groups, component, reasons = solve(state.atoms, list(tensors))
    batch = next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf)), 1)
    return ChannelGraph(skeleton, inputs, state, groups, component, reasons, owned, set(parameters), batch)


def _watch(model: nn.Module, arguments: tuple, state: Trace) -> None:
    """Runs the network under the dispatch mode; its outputs are pinned."""
    with quiet(), _stack(model, state), LabelMode(state):
        output = model(*arguments)
    for leaf in tree_leaves(output if not hasattr(output, "__dataclass_fields__") else vars(output)):
        if isinstance(leaf, Tensor):
            state.pin(state.of(leaf), "output of the network")


def _watch_training(model: nn.Module, arguments: tuple, state: Trace) -> None:
    """Runs the network once more in training mode, for layers that evaluation does not reach (auxiliary heads).

    A network without numbers, so that no statistics change; two copies of the batch, because BatchNorm refuses a single value.
    """
    modes = {module: module.training for module in model.modules()}
    doubled = tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf, arguments)
    model.train()
    try:
        _watch(model, doubled, state)
    except Exception:
        state.stack.clear()  # such layers then keep their shapes only as long as nothing they read is cut, which training reports
    finally:
        for module, mode in modes.items():
            module.training = mode
