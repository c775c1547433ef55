"""Checks that the decompositions share: weights, ranks, second moments, numbers. Each fault is a `UserError` of one sentence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError


def check_weight(weight: Tensor) -> None:
    """UserError unless the weight is a finite floating-point [o, c] or [o, c, kh, kw] tensor with elements."""
    if not isinstance(weight, Tensor):
        raise UserError(f"A weight of type {type(weight).__name__} cannot be decomposed; expected a torch.Tensor.")
    if weight.ndim not in (2, 4) or not weight.is_floating_point() or weight.numel() == 0:
        raise UserError(
            f"A weight of shape {tuple(weight.shape)} and type {weight.dtype} cannot be decomposed; "
            "expected a floating-point [o, c] or [o, c, kh, kw]."
        )
    if not torch.isfinite(weight).all():
        raise UserError(f"The weight of shape {tuple(weight.shape)} holds NaN or infinity; a decomposition needs finite weights.")


def most_products(weight: Tensor) -> int:
    """Rank at which a CP reproduces every convolution weight of this shape: min(o c, o k k, c k k)."""
    (o, c), offsets = weight.shape[:2], weight[0, 0].numel()
    return min(o * c, o * offsets, c * offsets)


def check_cp(weight: Tensor, rank: int, sweeps: int) -> None:
    """UserError unless a CP of this rank can be made of the weight by so many sweeps."""
    check_weight(weight)
    check_sweeps(sweeps)
    if weight.ndim != 4:
        raise UserError(f"CP expects a convolution weight [o, c, kh, kw], got shape {tuple(weight.shape)}; use an SVD for matrices.")
    check_rank("rank", rank, most_products(weight))


def check_rank(name: str, rank: int, largest: int) -> int:
    """The rank, or UserError unless it is an integer in [1, largest]."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        raise UserError(f"The {name} must be an integer from 1 to {largest}, got {rank!r}.")
    return rank


def check_ranks(ranks: tuple[int, int], weight: Tensor) -> tuple[int, int]:
    """(r_o, r_c), or UserError unless these are two integers in 1 .. o and 1 .. c."""
    if not isinstance(ranks, (tuple, list)) or len(ranks) != 2:
        raise UserError(f"The ranks must be a pair (output rank, input rank) of integers, got {ranks!r}.")
    return check_rank("output rank", ranks[0], weight.shape[0]), check_rank("input rank", ranks[1], weight.shape[1])


def check_sweeps(sweeps: int) -> None:
    """UserError unless the number of alternations is an integer above 0."""
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 1:
        raise UserError(f"The number of sweeps must be an integer above 0, got {sweeps!r}.")


def check_iterations(iterations: int) -> None:
    """UserError unless the number of descent steps is an integer of at least 0."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise UserError(f"The number of iterations must be an integer of at least 0, got {iterations!r}.")


def check_damping(damping: float) -> None:
    """UserError unless the damping is a finite number of at least 0."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not math.isfinite(damping) or damping < 0:
        raise UserError(f"The damping is a fraction of the mean eigenvalue, at least 0, got {damping!r}.")


def check_moments(A: Tensor, G: Tensor, weight: Tensor) -> None:
    """UserError unless A is square over the flattened inputs (with or without bias) or channels, and G over the outputs."""
    o, c, columns = weight.shape[0], weight.shape[1], weight[0].numel()
    sizes = {c: "channels"} | {columns: "inputs", columns + 1: "inputs and bias"}
    _check_square("A", A, weight, sizes)
    _check_square("G", G, weight, {o: "outputs"})


def check_second(second: Any, weight: Tensor) -> None:
    """UserError unless the EKFAC second moments are None, [o, c] (of every offset) or [o, c, kk]: in the basis of the channels.

    Moments of full patches, [o, c kk], belong to another basis.
    """
    o, c, size = weight.shape[0], weight.shape[1], weight[0, 0].numel()
    shapes = [(o, c), (o, c, size)]
    if second is not None and (not isinstance(second, Tensor) or tuple(second.shape) not in shapes):
        raise UserError(f"EKFAC second moments {_shape(second)} do not belong to a weight of shape {tuple(weight.shape)}; "
                        f"expected {' or '.join(map(str, shapes))}.")


def _check_square(name: str, moment: Any, weight: Tensor, sizes: dict[int, str]) -> None:
    square = isinstance(moment, Tensor) and moment.ndim == 2 and moment.shape[0] == moment.shape[1]
    if not square or moment.shape[0] not in sizes:
        expected = " or ".join(f"{size} ({what})" for size, what in sizes.items())
        raise UserError(f"The second moment {name} {_shape(moment)} does not belong to a weight of shape {tuple(weight.shape)}; "
                        f"expected a square matrix of size {expected}.")


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
