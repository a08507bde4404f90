"""Checks of arguments: the error names the argument, its value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, TypeGuard


def is_integer(value: Any, least: float = -math.inf) -> TypeGuard[int]:
    """Returns True for an ``int`` of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Returns True for a finite real number; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(argument: str, value: Any, least: int | None = None, expected: str = "") -> int:
    """An integer of at least `least`; a bool is none.

    Args:
        argument: the name that the error gives.
        value: its value.
        least: the smallest value that is right; None: all are.
        expected: what would be right, in words, if there is more to say.

    Raises:
        ValueError: if it is not.
    """
    if not is_integer(value, -math.inf if least is None else least):
        usual = {None: "an integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        raise ValueError(f"{argument}={value!r}: expected {expected or usual}")
    return value


def check_positive(
    argument: str, value: Any, expected: str = "a positive, finite number", most: float = math.inf
) -> float:
    """A finite number above 0, as a float; a bool is none.

    Args:
        argument: the name that the error gives.
        value: its value.
        expected: what would be right, in words.
        most: the largest value that is right.

    Raises:
        ValueError: if it is not.
    """
    if not is_number(value) or not 0 < value <= most:
        raise ValueError(f"{argument}={value!r}: expected {expected}")
    return float(value)


def check_share(argument: str, value: Any, *, ends: bool = True) -> float:
    """A number between 0 and 1, as a float.

    Args:
        argument: the name that the error gives.
        value: its value.
        ends: False: 0 and 1 are no shares.

    Raises:
        ValueError: if it is not.
    """
    if not is_number(value) or not 0 <= value <= 1 or (value in (0, 1) and not ends):
        raise ValueError(f"{argument}={value!r}: expected a share between 0 and 1")
    return float(value)


def check_strength(strength: float, argument: str = "strength") -> float:
    """A strength as a float.

    Raises:
        ValueError: if it is no finite, non-negative number.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise ValueError(f"{argument}={strength!r}: expected a number of at least 0")
    if not math.isfinite(strength) or strength < 0:
        raise ValueError(f"{argument}={strength!r}: expected a finite number of at least 0 (0 switches the method off)")
    return float(strength)


def check_choice(argument: str, value: str, choices: Collection[str], expected: str = "") -> str:
    """One of `choices`.

    Args:
        argument: the name that the error gives.
        value: its value.
        choices: the values that are right.
        expected: the same in words, if there is more to say.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(f"{argument}={value!r}: expected {expected or f'one of {list(choices)}'}")
    return value
