"""Which part of a batch is replayed: kept beside the batch, since a key in it would reach the user's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Kinds = list[list[tuple[bool, int | None]]]
"""Of each row of a batch its samples in order: whether it is replayed, and its length (None: the whole row)."""


def kinds_of(rows: Sequence[Any], new: int, lengths: Sequence[int] | None) -> Kinds:
    """The kinds of a planned batch.

    Args:
        rows: indices, or tuples of indices that share a row.
        new: how many new samples there are; replayed ones come behind them in index.
        lengths: tokens of all samples, if they are known.
    """
    return [
        [(index >= new, lengths[index] if lengths is not None else None) for index in row]
        if isinstance(row, tuple)
        else [(row >= new, None)]
        for row in rows
    ]


def rows_mask(kinds: Kinds | None, rows: int, length: int) -> Tensor:
    """``[rows, length]``: True where a position belongs to a replayed sample; padding belongs to the last one.

    Args:
        kinds: of the batch; None: nothing is replayed.
        rows: of the batch.
        length: of the batch.
    """
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, samples in enumerate(kinds or []):
        start = 0
        for replayed, tokens in samples:
            end = length if tokens is None else start + tokens
            mask[row, start:end] = replayed
            start = end
    return mask
