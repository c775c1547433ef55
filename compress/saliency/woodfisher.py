"""WoodFisher: S = theta_q^2 / (2 [F^-1]_qq), F block-diagonal (Singh and Alistarh 2020, arXiv:2004.14340).

Each tensor is cut into blocks of B consecutive weights; on a block F = damping * I + mean_i g_i g_i^T over the examples' gradients g_i
(empirical labels), inverted directly in float64. This is what the paper's rank-one recursion computes, whatever the order of the examples.
Pruned weights (mask buffers) take no part: their gradients are set to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.saliency import Batches, Loss, weight_criterion
from compress.saliency.per_example import example_gradients
from compress.saliency.statistics import parameters


def _blocks(rows: Tensor, size: int) -> Tensor:
    """`[n, weights]` padded with zeros and cut to `[blocks, n, size]`; no block is larger than the tensor."""
    size = min(size, rows.shape[1])
    padded = nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return padded.reshape(len(rows), -1, size).transpose(0, 1)


def _inverse_diagonal(fisher: Tensor, damping: float) -> Tensor:
    """Diagonals `[blocks, size]` of the inverses of `fisher + damping I`, some blocks at a time."""
    eye = torch.eye(fisher.shape[-1], dtype=torch.float64, device=fisher.device)
    return torch.cat([torch.linalg.inv(part.double() + damping * eye).diagonal(dim1=1, dim2=2) for part in fisher.split(4096)])


@weight_criterion("woodfisher", needs_data=True)
def woodfisher(
    model: nn.Module, names: Sequence[str], *, batches: Batches, loss_fn: Loss, block: int = 32, damping: float = 1e-5, **_: object
) -> dict[str, Tensor]:
    """theta^2 / (2 diag(F^-1)); `block` weights per block (memory: 4 * block bytes per weight), `damping` above 0."""
    if block < 1 or not damping > 0:
        raise UserError(f"Weight criterion 'woodfisher' needs block >= 1 and damping > 0, got {block!r} and {damping!r}.")
    chosen = dict(zip(names, parameters(model, names), strict=True))
    buffers = dict(model.named_buffers())
    sums: dict[str, Tensor] = {}
    total = 0
    for grads, count in example_gradients(model, names, batches, loss_fn):
        total += count
        for name, rows in grads.items():
            mask = buffers.get(name + "_mask")
            cut = _blocks((rows if mask is None else rows * mask).flatten(1), block)
            product = cut.transpose(1, 2) @ cut
            sums[name] = product if name not in sums else sums[name].add_(product)
    scores = {}
    for name, parameter in chosen.items():
        diagonal = _inverse_diagonal(sums[name] / total, damping).flatten()[: parameter.numel()].reshape(parameter.shape)
        scores[name] = parameter.detach().double().square() / (2 * diagonal)
    return scores
