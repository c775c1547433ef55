"""Checks of builder arguments; each fault is one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compress.errors import UserError
from compress.registry import nearest


def whole(name: str, value: Any) -> int:
    """`value` if it is an integer of at least 1.

    Raises
    ------
    UserError
        Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"Model argument {name!r} is {value!r}; expected an integer of at least 1.")
    return value


def scaled(channels: int, width: Any) -> int:
    """`channels * width` rounded to the nearest integer, at least 1.

    Raises
    ------
    UserError
        If `width` is no positive finite number.
    """
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if not number or not math.isfinite(width) or width <= 0:
        raise UserError(f"Model option 'width' is {width!r}; expected a positive number that multiplies the channels.")
    return max(1, round(channels * width))


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`.

    Raises
    ------
    UserError
        Otherwise, with the nearest value.
    """
    if value not in allowed:
        raise UserError(f"Model option {name!r} is {value!r}{nearest(str(value), list(allowed))}; expected one of {', '.join(allowed)}.")
    return value
