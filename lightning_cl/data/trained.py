"""The new samples of a batch that is being trained on, for methods that learn from them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


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
