"""Checks of arguments: the limits belong to the allowed side that is named, and the error names all three parts."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_cl.arguments import (
    check_choice,
    check_integer,
    check_positive,
    check_share,
    check_strength,
    is_integer,
    is_number,
)

NO_NUMBERS = ["1", None, True, math.nan, math.inf, -math.inf, [1]]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_finite_number_passes_no_check(value):
    assert not is_number(value)
    for check in (check_positive, check_share, check_integer):
        with pytest.raises(ValueError, match=r"^share=.*: expected "):
            check("share", value)
    with pytest.raises(ValueError, match=r"^alpha=.*: expected a"):
        check_strength(value, "alpha")


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_of_other_libraries_are_numbers(value):
    assert is_number(value)
    assert check_positive("rate", value, most=1) == check_share("rate", value) == value
    assert type(check_share("rate", value)) is float


def test_the_limits_of_an_interval():
    assert [check_share("x", value) for value in (0, 1)] == [0, 1]
    assert check_positive("x", 1, most=1) == 1
    assert check_strength(0) == 0
    assert check_integer("x", 3, 3) == 3
    assert check_integer("x", -7) == -7
    for check, value in [
        (lambda value: check_share("x", value, ends=False), 0),
        (lambda value: check_share("x", value, ends=False), 1.0),
        (lambda value: check_share("x", value), math.nextafter(1, 2)),
        (lambda value: check_positive("x", value, most=1), math.nextafter(1, 2)),
        (lambda value: check_positive("x", value), 0),
        (lambda value: check_integer("x", value, 3), 2),
        (lambda value: check_integer("x", value), 2.0),
    ]:
        with pytest.raises(ValueError, match=rf"^x={value!r}: expected"):
            check(value)
    assert [is_integer(value, 1) for value in (0, 1, True, 1.0)] == [False, True, False, False]


def test_the_error_says_what_would_be_right():
    with pytest.raises(ValueError, match=r"^samples=0: expected a positive integer$"):
        check_integer("samples", 0, 1)
    with pytest.raises(ValueError, match=r"^samples=1: expected an integer of at least 2$"):
        check_integer("samples", 1, 2)
    with pytest.raises(ValueError, match=r"^seed='a': expected an integer$"):
        check_integer("seed", "a")
    with pytest.raises(ValueError, match=r"^every=0: expected a positive number of steps$"):
        check_integer("every", 0, 1, "a positive number of steps")
    with pytest.raises(ValueError, match=r"^mode='x': expected one of \['online', 'separate'\]$"):
        check_choice("mode", "x", ("online", "separate"))
    with pytest.raises(ValueError, match=r"^mode='x': expected 'max' or 'min'$"):
        check_choice("mode", "x", ("max", "min"), "'max' or 'min'")
    assert check_choice("mode", "max", ("max", "min")) == "max"
