"""The budget of a buffer: its unit, and what a sample costs in it."""

from __future__ import annotations

from typing import Any, Literal

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.disk.layout import ALIGNMENT, RECORD
from lightning_cl.buffers.tokens import token_count

Unit = Literal["samples", "tokens", "bytes"]
_RECORD_BYTES = RECORD.itemsize  # what a record takes next to its content


def check_budget(capacity: int, unit: str) -> None:
    """Checks a budget.

    Raises:
        ValueError: if it is no positive whole number, or its unit is unknown.
    """
    check_choice("unit", unit, ("samples", "tokens", "bytes"), "'samples', 'tokens' or 'bytes'")
    check_integer("buffer_size", capacity, 1, f"a positive number of {unit}")


def check_fits(cost: int, task: str, capacity: int, unit: Unit) -> None:
    """Checks that a sample of a task fits into the budget.

    Raises:
        ValueError: if it costs more than the whole budget.
    """
    if cost > capacity:
        raise ValueError(
            f"buffer_size={capacity}: a sample of task {task!r} takes {cost} {unit}, more than the whole"
            f" budget; give at least {cost}"
        )


def cost_of(sample: Any, unit: Unit) -> int:
    """A sample's cost.

    Raises:
        ValueError: if tokens are counted and it is no token sequence.
    """
    if unit == "samples":
        return 1
    if unit == "tokens":
        tokens = token_count(sample)
        if tokens == 0:
            raise ValueError("unit='tokens': a sample is no token sequence; give unit='samples' or 'bytes'")
        return tokens
    encoded = encode(sample)
    return encoded.size + 4 * (-encoded.length % ALIGNMENT) + _RECORD_BYTES


def cost_of_tokens(length: int, unit: Unit) -> int:
    """The cost of a token sequence of this length."""
    blocks = -(-length // ALIGNMENT)  # each takes a byte of the mask
    return {"samples": 1, "tokens": length, "bytes": blocks * (4 * ALIGNMENT + 1) + _RECORD_BYTES}[unit]
