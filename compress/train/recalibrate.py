"""BatchNorm statistics measured anew after surgery.

Per BatchNorm module and channel, over the calls k = 1..K with n_k values each (images times positions):
    running_mean = sum_k n_k mean_k / sum_k n_k,    running_var = sum_k n_k var_k / sum_k n_k
with mean_k and the unbiased var_k of call k: PyTorch's cumulative average (`momentum=None`), but weighted by n_k, so that a smaller last
batch counts by its size. For equal sizes both are the same. The variance is that within batches, which is what training normalises with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import UserError
from compress.train.modes import mode


def _without_single(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The inputs, a single image being appended to the batch before it: one image has no variance on 1 x 1 maps."""
    held: Tensor | None = None
    for x, *_ in batches:
        if held is not None and len(x) == 1:
            held = torch.cat([held, x])
            continue
        if held is not None:
            yield held
        held = x
    if held is not None:
        yield held


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the running statistics of every BatchNorm of `model` by those of `batches` of (x, y), in place.

    Only BatchNorm modules are in training mode (no dropout); no gradients; momentum and train/eval flags are put back. A network without
    BatchNorm is left as it is. Where a batch fails or there is none (`UserError`), the old statistics are put back.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    old = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    values = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        count = inputs[0].numel() // inputs[0].shape[1]
        if count < 2:
            raise UserError("BatchNorm statistics need at least 2 values per channel; give at least 2 images (prune.recalibration_images).")
        values[norm] += count
        norm.momentum = count / values[norm]

    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    done = False
    try:
        with torch.no_grad(), mode(model, False):
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            for x in _without_single(batches):
                model(x)
                done = True
    except BaseException:
        done = False
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum, buffers in zip(norms, momenta, old, strict=True):
            norm.momentum = momentum
            if not done:
                for buffer, before in zip(norm.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(before)
    if not done:
        raise UserError("BatchNorm statistics were to be measured on no image; at least one batch is needed.")
