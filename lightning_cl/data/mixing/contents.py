"""Samples of a batch: the replayed ones, kept apart since a key in it would reach the model, and the new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.mixing.replayed import Samples


class Part(NamedTuple):
    """A sample in a row of a batch.

    Attributes:
        replayed: whether it is.
        length: its tokens; None: the whole row.
        owner: the buffer that a replayed sample comes from.
        number: the number of its record there.
    """

    replayed: bool
    length: int | None
    owner: ReplayBuffer | None = None
    number: int = -1


Kinds = list[list[Part]]
"""Of each row of a batch its samples in order."""


def kinds_of(rows: Sequence[Any], samples: Samples) -> Kinds:
    """The kinds of a planned batch.

    Args:
        rows: indices, or tuples of indices that share a row.
        samples: what they stand for.
    """
    lengths, new = samples.lengths, len(samples.new)

    def parts(row: tuple[int, ...]) -> Iterator[Part]:
        for index in row:
            length = lengths[index] if lengths is not None else None
            record = samples.record_of(index, others=False)
            if record is not None or index < new:  # else it was removed
                yield Part(False, length) if record is None else Part(True, length, *record)

    def whole(index: int) -> Part:
        record = samples.record_of(index)
        return Part(False, None) if record is None else Part(True, None, *record)

    return [list(parts(row)) if isinstance(row, tuple) else [whole(row)] for row in rows]


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
        for part in samples:
            end = length if part.length is None else start + part.length
            mask[row, start:end] = part.replayed
            start = end
    return mask


class Trained:
    """The new samples of a global batch, of all ranks together; loaded only when they are asked for.

    Args:
        epoch: which pass over the task's data.
        number: of the batch in that pass, from 1.
        items: indices into a data set, or samples.
        load: gives the sample of an item.

    Attributes:
        epoch: which pass over the task's data.
        number: of the batch in that pass, from 1.
    """

    def __init__(self, epoch: int, number: int, items: Sequence[Any], load: Callable[[Any], Any] | None = None) -> None:
        self.epoch, self.number = epoch, number
        self._items, self._load = items, load

    def __len__(self) -> int:
        return len(self._items)

    def sample(self, place: int) -> Any:
        """A sample."""
        return self._items[place] if self._load is None else self._load(self._items[place])

    def index(self, place: int) -> int:
        """Its place in the task's data; −1 in a stream."""
        return -1 if self._load is None else int(self._items[place])
