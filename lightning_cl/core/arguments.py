"""Checks of arguments: the error names the argument, its value and what would be right."""

from __future__ import annotations

import math


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


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> str:
    """One of `choices`.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(f"{argument}={value!r}: expected one of {list(choices)}")
    return value
