"""Checks of a similarity's options: each names the option, its value and what was expected."""

from __future__ import annotations

import math
from typing import TypeAlias, TypeGuard

from ..errors import ArgumentError

Number: TypeAlias = float | int


def check_count(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}. Use a whole number of at least 1.")


def check_share(name: str, value: object) -> None:
    """Raise ArgumentError unless ``0 < value <= 1``."""
    if not (_is_number(value) and 0 < value <= 1):
        raise ArgumentError(f"{name} is {value!r}. Use a number above 0 and at most 1.")


def check_positive(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is finite and above 0."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ArgumentError(f"{name} is {value!r}. Use a finite number above 0.")


def check_not_negative(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is finite and at least 0."""
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ArgumentError(f"{name} is {value!r}. Use a finite number of at least 0.")


def _is_number(value: object) -> TypeGuard[Number]:
    return isinstance(value, int | float) and not isinstance(value, bool)
