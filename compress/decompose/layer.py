"""`factorize`: one Linear or Conv2d in, a smaller block out (or the very same module where nothing is gained)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from compress.decompose.eigen import eigendamage
from compress.decompose.factors import Factors
from compress.decompose.kfac import kfac_svd, kfac_tucker2
from compress.decompose.modules import build_block, dense_weight, factorizable, layer_cost
from compress.decompose.unweighted import cp, svd, tucker2
from compress.errors import UserError
from compress.registry import nearest

PLAIN: dict[str, Callable[..., Factors]] = {"svd": svd, "tucker2": tucker2, "cp": cp}
WEIGHTED: dict[str, Callable[..., Factors]] = {"eigendamage": eigendamage, "kfac_svd": kfac_svd, "kfac_tucker2": kfac_tucker2}


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
    method: "svd", "tucker2", "cp", "eigendamage", "kfac_svd", "kfac_tucker2", or finished `Factors`.
    rank: an integer (svd, cp, kfac_svd) or a pair (r_o, r_c) per group (tucker2, eigendamage, kfac_tucker2).
    A, G: input and output-gradient second moments for the weighted methods, as in `LayerFactors`: [d, d], or [groups, d, d].
    input_shape: one image's input shape, [c, h, w] or [..., features]; given it, "smaller" counts MACs as well as parameters.
    only_if_smaller: return `module` itself unless the block has fewer parameters (and MACs, see `input_shape`).
    options: passed to the decomposition (`mode` of svd, `sweeps`, ...).

    Raises
    ------
    UserError: module or rank that the method cannot take, missing A or G, unknown method.
    """
    if not factorizable(module):
        raise UserError(f"A module of type {type(module).__name__} cannot be factorized; expected exactly Linear or Conv2d.")
    block = build_block(module, method if isinstance(method, Factors) else _decompose(module, method, rank, A, G, options))
    if not only_if_smaller:
        return block
    shape = input_shape or ((module.in_channels, *module.kernel_size) if hasattr(module, "kernel_size") else (module.in_features,))
    new, old = layer_cost(block, shape), layer_cost(module, shape)
    return block if new[0] < old[0] and (input_shape is None or new[1] < old[1]) else module


def _decompose(
    module: nn.Module, method: str, rank: int | tuple[int, int] | None, A: Tensor | None, G: Tensor | None, options: dict[str, Any]
) -> Factors:
    if method not in PLAIN and method not in WEIGHTED:
        known = [*PLAIN, *WEIGHTED]
        raise UserError(f"Unknown decomposition {method!r}{nearest(method, known)}; known: {', '.join(known)}.")
    if rank is None:
        raise UserError(f"The decomposition {method!r} needs a rank.")
    weight, groups = dense_weight(module), getattr(module, "groups", 1)
    weights = weight.chunk(groups)
    if method in PLAIN:
        return _joined([PLAIN[method](part, rank, **options) for part in weights])
    if A is None or G is None:
        raise UserError(
            f"The decomposition {method!r} needs the second moments A and G of the layer; collect them with compress.curvature.collect."
        )
    pairs = zip(A.reshape(groups, *A.shape[-2:]), G.reshape(groups, *G.shape[-2:]), strict=True)
    return _joined([WEIGHTED[method](part, a, g, rank, **options) for part, (a, g) in zip(weights, pairs, strict=True)])


def _joined(parts: list[Factors]) -> Factors:
    return Factors.join(parts) if len(parts) > 1 else parts[0]
