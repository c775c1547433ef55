"""`factorize`: one Linear or Conv2d in, a smaller block out (or the very same module where nothing is gained)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from compress.decompose.eigen import eigendamage
from compress.decompose.factors import Factors
from compress.decompose.kfac import kfac_svd, kfac_tucker2
from compress.decompose.kfac_cp import kfac_cp
from compress.decompose.modules import build_block, dense_weight, factorizable, layer_cost, output_size
from compress.decompose.unweighted import cp, svd, tucker2
from compress.errors import UserError
from compress.registry import nearest

PLAIN: dict[str, Callable[..., Factors]] = {"svd": svd, "tucker2": tucker2, "cp": cp}
WEIGHTED: dict[str, Callable[..., Factors]] = {"eigendamage": eigendamage, "kfac_svd": kfac_svd, "kfac_tucker2": kfac_tucker2, "kfac_cp": kfac_cp}


def factorize(
    module: nn.Module,
    method: str | Factors = "tucker2",
    rank: int | tuple[int, int] | None = None,
    *,
    A: Tensor | None = None,
    G: Tensor | None = None,
    input_shape: tuple[int, ...] | None = None,
    only_if_smaller: bool = True,
    **options: Any,
) -> nn.Module:
    """A block of two or three smaller layers in the place of a Linear or Conv2d; the module itself is not changed.

    Parameters
    ----------
    module: exactly `nn.Linear` or `nn.Conv2d`, or a block made here (its product is decomposed again). Grouped convolutions are
        decomposed per group with equal ranks.
    method: "svd", "tucker2", "cp", "eigendamage", "kfac_svd", "kfac_tucker2", "kfac_cp", or finished `Factors`.
    rank: an integer (svd, cp, kfac_svd, kfac_cp) or a pair (r_o, r_c) per group (tucker2, eigendamage, kfac_tucker2).
    A, G: input and output-gradient second moments for the weighted methods, as in `LayerFactors`: [d, d], or [groups, d, d] (as `second` of
        eigendamage) of a grouped convolution.
    input_shape: one image's input shape, [c, h, w] or [..., features]; given it, "smaller" counts MACs as well as parameters.
    only_if_smaller: return `module` itself unless the block has fewer parameters (and MACs, see `input_shape`).
    options: passed to the decomposition (`mode` of svd, `sweeps`, ...).

    Raises
    ------
    UserError: module, rank or option that the method cannot take, missing A or G or those of another layer, unknown method, factors that do
    not compose to the layer, an input shape that the layer does not read.
    """
    if not factorizable(module):
        raise UserError(f"A module of type {type(module).__name__} cannot be factorized; expected exactly Linear or Conv2d.")
    if input_shape is not None:
        _check_input_shape(module, input_shape)
    block = build_block(module, method if isinstance(method, Factors) else _decompose(module, method, rank, A, G, options))
    if not only_if_smaller:
        return block
    shape = input_shape or ((module.in_channels, *module.kernel_size) if hasattr(module, "kernel_size") else (module.in_features,))
    new, old = layer_cost(block, shape), layer_cost(module, shape)
    return block if new[0] < old[0] and (input_shape is None or new[1] < old[1]) else module


def _decompose(
    module: nn.Module, method: str, rank: int | tuple[int, int] | None, A: Tensor | None, G: Tensor | None, options: dict[str, Any]
) -> Factors:
    known = PLAIN | WEIGHTED
    if not isinstance(method, str) or method not in known:
        hint = nearest(method, list(known)) if isinstance(method, str) else ""
        raise UserError(f"Unknown decomposition {method!r}{hint}; known: {', '.join(known)}.")
    if rank is None:
        raise UserError(f"The decomposition {method!r} needs a rank.")
    allowed = [name for name in inspect.signature(known[method]).parameters if name not in ("weight", "A", "G", "rank", "ranks")]
    for option in options:
        if option not in allowed:
            raise UserError(f"The decomposition {method!r} has no option {option!r}{nearest(option, allowed)}; known: {', '.join(allowed)}.")
    weight, groups = dense_weight(module), getattr(module, "groups", 1)
    weights = weight.chunk(groups)
    if method in PLAIN:
        return _joined([PLAIN[method](part, rank, **options) for part in weights])
    if A is None or G is None:
        raise UserError(
            f"The decomposition {method!r} needs the second moments A and G of the layer; collect them with compress.curvature.collect."
        )
    given = {"A": A, "G": G} | {name: moment for name, moment in options.items() if name == "second" and moment is not None}
    moments = {name: _per_group(name, moment, groups) for name, moment in given.items()}
    parts = []
    for group, part in enumerate(weights):
        a, g, *second = (moment[group] for moment in moments.values())
        parts.append(WEIGHTED[method](part, a, g, rank, **(options | {"second": second[0]} if second else options)))
    return _joined(parts)


def _per_group(name: str, moment: Tensor, groups: int) -> list[Tensor]:
    """A moment of every group; an ungrouped layer has one, with or without a leading dimension of one."""
    if groups == 1:
        return [moment[0] if isinstance(moment, Tensor) and moment.ndim == 3 and len(moment) == 1 else moment]
    if not isinstance(moment, Tensor) or moment.ndim < 3 or len(moment) != groups:
        found = f"of shape {tuple(moment.shape)}" if isinstance(moment, Tensor) else f"of type {type(moment).__name__}"
        raise UserError(f"The second moment {name} {found} does not belong to a convolution in {groups} groups; expected one per group, [{groups}, ...].")
    return list(moment)


def _check_input_shape(module: nn.Module, shape: tuple[int, ...]) -> None:
    convolution = hasattr(module, "kernel_size")
    expected = f"[{module.in_channels}, height, width]" if convolution else f"[..., {module.in_features}]"
    fits = isinstance(shape, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in shape)
    if convolution:
        fits = fits and len(shape) == 3 and shape[0] == module.in_channels and min(output_size(module, tuple(shape[1:]))) > 0
    else:
        fits = fits and len(shape) > 0 and shape[-1] == module.in_features
    if not fits:
        reason = ", large enough for the kernel" if convolution else ""
        raise UserError(f"The input shape {shape!r} is not one image's of this layer; expected {expected}{reason}.")


def _joined(parts: list[Factors]) -> Factors:
    return Factors.join(parts) if len(parts) > 1 else parts[0]
