"""Output gradients whose outer products average to the Fisher matrix of the network's outputs. Tensors in, tensors out.

Symbols: logits z [b, classes, ...] (further dimensions are positions, each with its own label), p = softmax(z) over dimension 1.
    cross_entropy  d/dz of -log p(y): p - e_y       E_y over p gives diag p - p p^T (generalised Gauss-Newton, "type 2")
    mse            d/dz of 1/2 ||z - y||^2: z - y   E_y over N(z, 1) gives the identity
`true` draws labels from the model, `exact` weighs every class (one backward pass per output number), `empirical` takes the data's labels.
Losses are per image, summed over its positions, never averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import UserError

FISHERS = ("true", "exact", "empirical")
LOSSES = ("cross_entropy", "mse")


def check(fisher: str, loss: str, samples: int) -> None:
    """UserError for an unknown Fisher kind or loss, or fewer than one sample."""
    if fisher not in FISHERS:
        raise UserError(f"Unknown Fisher kind {fisher!r}; known: {', '.join(FISHERS)}.")
    if loss not in LOSSES:
        raise UserError(f"Unknown loss {loss!r}; known: {', '.join(LOSSES)}.")
    if not isinstance(samples, int) or samples < 1:
        raise UserError(f"The number of label samples per image must be an integer from 1, got {samples!r}.")


def cotangents(logits: Tensor, labels: Tensor | None, fisher: str, loss: str, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Gradients with respect to the logits, one per backward pass; the sum of their outer products is the Fisher matrix per image.

    Raises
    ------
    UserError: logits without a batch and a class dimension, or `empirical` without labels or with labels that do not fit.
    """
    logits = logits.detach()
    if logits.ndim < 2:
        raise UserError(f"The network gave an output of shape {tuple(logits.shape)}; expected [images, classes, ...].")
    if fisher == "empirical":
        if labels is None:
            raise UserError("The empirical Fisher needs labels; give batches of (images, labels).")
        yield _from_labels(logits, labels, loss)
    elif fisher == "true":
        for _ in range(samples):
            yield _sampled(logits, loss, generator) / samples**0.5
    else:
        yield from _exact(logits, loss)


def _from_labels(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    # p - 1 of a confident network is lost where p itself is rounded to a half type
    precise = logits.double()
    if loss == "mse":
        if labels.shape != logits.shape:
            raise UserError(f"Targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(logits.shape)}; the loss 'mse' needs one target per output.")
        return (precise - labels.to(precise)).to(logits)
    labels = labels.to(logits.device)
    if labels.shape != logits.shape[:1] + logits.shape[2:] or labels.is_floating_point():
        raise UserError(f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit outputs of shape {tuple(logits.shape)}.")
    outside = labels[(labels < 0) | (labels >= logits.shape[1])]
    if len(outside):
        raise UserError(
            f"A label is {int(outside[0])}, expected 0 to {logits.shape[1] - 1} for outputs of {logits.shape[1]} classes; "
            "leave such images out, or use the fisher 'true', which needs no labels."
        )
    return (precise.softmax(1) - one_hot(labels, precise)).to(logits)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels [b, ...] as ones at their class in the logits' shape [b, classes, ...]."""
    return functional.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1).to(logits)


def _sampled(logits: Tensor, loss: str, generator: torch.Generator) -> Tensor:
    """One sample; numbers are drawn on the generator's device so that a seed gives the same labels on every device."""
    if loss == "mse":
        return torch.randn(logits.shape, generator=generator, device=generator.device, dtype=torch.float64).to(logits)
    p = logits.double().softmax(1)
    u = torch.rand(p[:, :1].shape, generator=generator, device=generator.device, dtype=torch.float64).to(p.device)
    labels = (p.cumsum(1) < u).sum(1).clamp_max(p.shape[1] - 1)
    return (p - one_hot(labels, p)).to(logits)


def _exact(logits: Tensor, loss: str) -> Iterator[Tensor]:
    classes = logits.shape[1]
    positions = logits[0, 0].numel()
    p = logits.double().softmax(1)
    p = p.flatten(2) if logits.ndim > 2 else p[..., None]
    for position in range(positions):
        for label in range(classes):
            out = torch.zeros_like(p)
            if loss == "mse":
                out[:, label, position] = 1
            else:
                out[:, :, position] = p[:, :, position]
                out[:, label, position] -= 1
                out *= p[:, label, position].sqrt()[:, None, None]
            yield out.reshape(logits.shape).to(logits)
