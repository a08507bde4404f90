"""Small tools that several methods share: precision, counts from shares, the largest entries, and checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is in fp64: sums and differences in 16 bits would lose small changes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def count_of(share: float, total: int) -> int:
    """``share · total`` rounded to the nearest integer, halves upwards; at least 1 unless `total` is 0.

    Args:
        share: between 0 and 1.
        total: a number of entries.
    """
    return min(total, max(1, math.floor(share * total + 0.5)))


@torch.no_grad()
def largest(magnitudes: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """A mask that is True at the `count` largest entries.

    Exactly `count` entries are chosen. Of entries that are equal, those with the lower index come first, so that the
    result is the same on every device.

    Memory: 12 bytes for each chosen entry, then 11 bytes for each entry. Compute: one partial sort and four passes.

    Args:
        magnitudes: non-negative, of any shape.
        count: how many to choose, at most as many as there are to choose from.
        among: a mask of the same shape; only entries where it is True are chosen from. None: all.

    Returns:
        A boolean tensor of the shape of `magnitudes`.

    Raises:
        ValueError: if an entry is NaN, if `count` does not fit, or if the tensor is sharded over processes.
    """
    check_whole("magnitudes", magnitudes)
    if bool(magnitudes.isnan().any()):
        raise ValueError("magnitudes: some are NaN, expected numbers; the weights may have diverged")
    available = magnitudes.numel() if among is None else int(among.sum())
    if not 0 <= count <= available:
        raise ValueError(f"count: {count}, expected 0 to {available}, the number of entries to choose from")
    flat = magnitudes.reshape(-1)
    if among is not None:
        flat = flat.masked_fill(~among.reshape(-1), -1.0)
    if count == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    threshold = flat.topk(count, sorted=False).values.min()
    above, equal = flat > threshold, flat == threshold
    missing = count - int(above.sum())
    chosen = above | (equal & (equal.cumsum(0) <= missing))
    return chosen.reshape(magnitudes.shape)


def check_whole(argument: str, tensor: Tensor) -> None:
    """Refuses a sharded tensor: a process would choose among its own part, or draw for it.

    Args:
        argument: its name, for the message.
        tensor: the tensor.

    Raises:
        ValueError: if it is a DTensor.
    """
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{argument}: a sharded tensor, expected a whole one; gather it with `full_tensor()` first")


def check_share(argument: str, value: float, zero: bool = False) -> None:
    """Refuses a share that is no number between 0 and 1.

    Args:
        argument: its name, for the message.
        value: the share.
        zero: True if 0 is allowed, too.

    Raises:
        ValueError: if the share is out of range.
    """
    if not (0.0 <= value <= 1.0) or (value == 0.0 and not zero):
        raise ValueError(f"{argument}: {value}, expected a number {'from 0 to 1' if zero else 'above 0 and up to 1'}")


def check_fits(argument: str, tensor: Tensor, like: Tensor, of: str) -> None:
    """Refuses a tensor that would be broadcast in silence, or that holds no floating-point numbers.

    Args:
        argument: its name, for the message.
        tensor: the tensor.
        like: the tensor whose shape is expected.
        of: the name of `like`, for the message.

    Raises:
        ValueError: if the shape or the type does not fit.
    """
    if tensor.shape != like.shape:
        raise ValueError(f"{argument}: shape {list(tensor.shape)}, expected {list(like.shape)} as in {of}")
    if not tensor.is_floating_point():
        raise ValueError(f"{argument}: type {tensor.dtype}, expected floating-point numbers")
