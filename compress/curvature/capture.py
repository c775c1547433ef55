"""Runs a network for statistics and leaves it as it was: hooks, flags, buffers and `.grad`, whatever the network raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compress.arguments import unusable
from compress.errors import UserError
from compress.undisturbed import keep_buffers

InputHook = Callable[[str, Tensor], None]
OutputHook = Callable[[str, Tensor], Callable[[Tensor], None] | None]


@contextmanager
def preserved(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation mode (training mode on request), no parameter asks for a gradient; everything is restored afterwards.

    Buffers are restored in value and identity, and so is the global random state, which dropout and other modules draw from.

    Raises
    ------
    UserError: a parameter or buffer that no gradient can be computed with (without values, or made in inference mode).
    """
    reason = unusable(model)
    if reason:
        raise UserError(reason)
    flags = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    restore = keep_buffers(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda}
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        try:
            # the fused attention path of evaluation mode would bypass the linear layers that it contains
            torch.backends.mha.set_fastpath_enabled(False)
            model.train(training)
            for parameter, _ in gradients:
                parameter.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, flag in flags:
                module.training = flag
            for parameter, flag in gradients:
                parameter.requires_grad_(flag)
            restore()


class Tape:
    """Lets hooks see the inputs of chosen layers and the gradients of their outputs.

    The gradients flow from the network's output to a scalar zero that is added to every layer output which nothing before made
    differentiable; no gradient of a parameter is computed or stored. What activation checkpointing runs again during `backward` was
    seen before and is not shown to the hooks a second time.
    """

    def __init__(self, layers: dict[str, nn.Module], on_input: InputHook | None, on_output: OutputHook | None) -> None:
        self._layers, self._on_input, self._on_output = layers, on_input, on_output
        self._anchors: dict[torch.device, Tensor] = {}
        self._stack = ExitStack()
        self._backward = False

    def __enter__(self) -> Tape:
        for name, module in self._layers.items():
            if self._on_input is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._read(name, _first(args, kwargs)), with_kwargs=True
                )
                self._stack.callback(handle.remove)
            if self._on_output is not None:
                self._stack.callback(module.register_forward_hook(lambda _, args, output, name=name: self._watch(name, output)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._anchors.clear()

    def _read(self, name: str, x: Tensor) -> None:
        if not self._backward:
            self._on_input(name, x)

    def _watch(self, name: str, output: Tensor) -> Tensor | None:
        hook = None if self._backward else self._on_output(name, output)
        if not torch.is_grad_enabled() or (hook is None and not self._backward):
            return None
        anchored = None
        if not output.requires_grad:
            anchor = self._anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
            # a sum and not a view, so that operators in place may follow
            output = anchored = output + anchor
        if hook is not None:  # a second run must make the same graph, so that it is anchored like the first
            output.register_hook(lambda gradient: hook(gradient.detach()))
        return anchored

    def backward(self, output: Tensor, cotangent: Tensor, retain: bool) -> None:
        """Sends one cotangent back through the graph of `output`; the hooks see the gradients.

        Raises
        ------
        UserError: activation checkpointing of the kind that gives no gradients of activations.
        """
        if not self._anchors or not output.requires_grad:
            return
        self._backward = True
        try:
            torch.autograd.grad(output, list(self._anchors.values()), cotangent, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise UserError(
                "The network uses activation checkpointing with use_reentrant=True, which hides the gradients of its layers' outputs; "
                "use use_reentrant=False or switch it off."
            ) from error
        finally:
            self._backward = False


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
