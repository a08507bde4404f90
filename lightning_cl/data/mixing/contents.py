"""The samples of a batch, new and replayed; this is kept outside the batch, since a key in it would reach the model."""

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
        replayed: True if it is replayed.
        length: its tokens; None: it fills the whole row.
        owner: the buffer that a replayed sample comes from.
        number: the number of its record there.
    """

    replayed: bool
    length: int | None
    owner: ReplayBuffer | None = None
    number: int = -1


Kinds = list[list[Part]]
"""For each row of a batch, its samples in order."""


def kinds_of(rows: Sequence[Any], samples: Samples) -> Kinds:
    """The samples of a planned batch, by row.

    Args:
        rows: indices of samples, or tuples of indices that share a row.
        samples: the samples that have these indices.
    """
    lengths, new = samples.lengths, len(samples.new)

    def parts(row: tuple[int, ...]) -> Iterator[Part]:
        for index in row:
            length = lengths[index] if lengths is not None else None
            record = samples.record_of(index, others=False)
            if record is not None or index < new:  # otherwise the sample was removed
                yield Part(False, length) if record is None else Part(True, length, *record)

    def whole(index: int) -> Part:
        record = samples.record_of(index)
        return Part(False, None) if record is None else Part(True, None, *record)

    return [list(parts(row)) if isinstance(row, tuple) else [whole(row)] for row in rows]


def rows_mask(kinds: Kinds | None, rows: int, length: int) -> Tensor:
    """``[rows, length]``: True where a position belongs to a replayed sample; padding belongs to the last one.

    Args:
        kinds: the samples of the batch; None: nothing is replayed.
        rows: number of rows of the batch.
        length: number of positions in a row.
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
    """The new samples of a batch, of all ranks together; they are loaded only when they are asked for.

    Args:
        epoch: number of the pass over the task's data.
        number: number of the batch in that pass, from 1.
        items: indices into a data set, or samples.
        load: a function that gives the sample of an item; None: the items are the samples.

    Attributes:
        epoch: number of the pass over the task's data.
        number: number of the batch in that pass, from 1.
    """

    def __init__(self, epoch: int, number: int, items: Sequence[Any], load: Callable[[Any], Any] | None = None) -> None:
        self.epoch, self.number = epoch, number
        self._items, self._load = items, load

    def __len__(self) -> int:
        return len(self._items)

    def sample(self, position: int) -> Any:
        """The sample at a position in the batch."""
        return self._items[position] if self._load is None else self._load(self._items[position])

    def index(self, position: int) -> int:
        """The index in the task's data of the sample at a position in the batch; −1 for a stream."""
        return -1 if self._load is None else int(self._items[position])
