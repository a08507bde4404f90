"""Which samples of a stream stay in a buffer of fixed size.

A policy answers one question, in O(1): into which slot does the next sample of the stream go? A slot number equal to
the current size means "append", a smaller one "overwrite", ``None`` "leave it out".
"""

from __future__ import annotations

import random
from typing import Any, Protocol


class Policy(Protocol):
    """What :class:`~lightning_cl.buffers.ReplayBuffer` asks of a selection policy."""

    def place(self, capacity: int, task: str, rng: random.Random) -> int | None:
        """The slot for the next sample of `task`, or None to leave it out."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, enough to continue the stream."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""


class Reservoir:
    """Every sample of the stream so far is in the buffer with the same probability (Vitter 1985, algorithm R).

    Large tasks get many slots, small ones few.
    """

    def __init__(self) -> None:
        self.seen = 0

    def place(self, capacity: int, task: str, rng: random.Random) -> int | None:
        """See :class:`Policy`."""
        self.seen += 1
        if self.seen <= capacity:
            return self.seen - 1
        slot = rng.randrange(self.seen)  # uniform over 0 … seen − 1: the new sample counts too
        return slot if slot < capacity else None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Policy`."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Policy`."""
        self.seen = state["seen"]


class TaskBalanced:
    """Every task gets an equal share of the buffer, uniform within the task.

    Reservoir sampling balanced over tasks (Chrysakis & Moens 2020, algorithm 1, with the task as the class): as long as
    a task is not the largest in the buffer, its new sample takes the place of a random one of the largest task. What a
    small task does not need, the others keep.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self._slots: dict[str, list[int]] = {}
        self._size = 0

    def place(self, capacity: int, task: str, rng: random.Random) -> int | None:
        """See :class:`Policy`."""
        self.seen[task] = self.seen.get(task, 0) + 1
        own = self._slots.setdefault(task, [])
        if self._size < capacity:
            own.append(self._size)
            self._size += 1
            return self._size - 1
        largest = max(self._slots, key=lambda name: len(self._slots[name]))
        # A task that has lost samples goes on as a reservoir: a sure place would favour its late samples.
        complete = len(own) == self.seen[task] - 1
        if complete and len(own) < len(self._slots[largest]):
            slots = self._slots[largest]
            position = rng.randrange(len(slots))
            slot = slots[position]
            slots[position] = slots[-1]
            slots.pop()
            own.append(slot)
            return slot
        position = rng.randrange(self.seen[task])  # a reservoir within the task
        return own[position] if position < len(own) else None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Policy`."""
        return {"seen": dict(self.seen), "slots": {name: list(slots) for name, slots in self._slots.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Policy`."""
        self.seen = dict(state["seen"])
        self._slots = {name: list(slots) for name, slots in state["slots"].items()}
        self._size = sum(len(slots) for slots in self._slots.values())
