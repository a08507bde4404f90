"""The slots of a buffer: which of them are filled, with which record, and of which task."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_cl.buffers.selection import Selection, spread
from lightning_cl.buffers.store import as_numbers
from lightning_cl.random_state import seed_of

_EMPTY, _WAITING = -1, -2


class Slots:
    """Slots within a budget; each is empty, waits for its record, or is filled with one.

    Args:
        capacity: the budget.

    Attributes:
        count: how many are filled.
        per_task: the same for each task.
        task_names: the tasks of all samples that ever had a slot, in order.
        held: the records that were in the slots at the last :meth:`hold`, if there was one.
    """

    def __init__(self, capacity: int) -> None:
        self._selection = Selection(capacity)
        # One entry per slot of it: the record's number, or one of the marks, and the task.
        self._numbers, self._tasks = array("q"), array("i")
        self.task_names: list[str] = []
        self.count = 0
        self.per_task: Counter[str] = Counter()
        self.held: array[int] | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, slot: int) -> int:
        return self._numbers[slot]

    def filled(self) -> Iterator[int]:
        """The slots that are filled."""
        return (slot for slot, number in enumerate(self._numbers) if number >= 0)

    @property
    def numbers(self) -> Sequence[int]:
        """The records in the filled slots."""
        if self.count == len(self._numbers):
            return self._numbers
        return array("q", (number for number in self._numbers if number >= 0))

    @property
    def tasks(self) -> array[int]:
        """For each filled slot the index of its task in :attr:`task_names`."""
        return array("i", (self._tasks[slot] for slot in self.filled()))

    def pick(self, value: int, task: str | None, slots: int | None) -> int | None:
        """The record that a large random number stands for (:meth:`~lightning_cl.buffers.ReplayBuffer.pick`)."""
        wanted = None if task is None else self.task_names.index(task)
        slots = min(slots or len(self._numbers), len(self._numbers))
        for slot in chain((seed_of(value, i) % slots for i in range(256)), range(slots)):
            if self._numbers[slot] >= 0 and wanted in (None, self._tasks[slot]):
                return self._numbers[slot]
        return None

    # ------------------------------------------------------------------ filling

    def choose(self, group: str, key: float, cost: int, task: str) -> tuple[int | None, list[int]]:
        """Decides if a new sample gets a slot, as :meth:`~lightning_cl.buffers.selection.Selection.choose` does.

        Returns:
            the newcomer's slot, which waits for its record (None if there is none), and the evicted records.
        """
        slot, gone = self._selection.choose(group, key, cost)
        left = self._empty(gone)
        if slot is None:
            return None, left
        if task not in self.task_names:
            self.task_names.append(task)
        if slot == len(self._numbers):
            self._numbers.append(_WAITING)
            self._tasks.append(0)
        self._numbers[slot], self._tasks[slot] = _WAITING, self.task_names.index(task)
        return slot, left

    def is_waiting(self, slot: int) -> bool:
        """True if a slot is chosen and has no record yet."""
        return self._numbers[slot] == _WAITING

    def put(self, slot: int, number: int) -> None:
        """Fills a slot with a record."""
        self._numbers[slot] = number
        self.count += 1
        self.per_task[self.task_names[self._tasks[slot]]] += 1

    def renumber(self, numbers: Sequence[int]) -> None:
        """Replaces the numbers of all records, given in the order of the filled slots."""
        new = dict(zip(self.numbers, numbers, strict=True))
        for slot in self.filled():
            self._numbers[slot] = new[self._numbers[slot]]
        if self.held is not None:
            self.held = array("q", (new[number] for number in self.held if number in new))

    def hold(self) -> None:
        """Remembers the records that are in the slots now, as :attr:`held`."""
        self.held = array("q", self.numbers)

    def release(self, slots: Sequence[int]) -> list[int]:
        """Empties slots, and returns the records that were in them."""
        self._selection.release(slots)
        return self._empty(slots)

    def _empty(self, slots: Sequence[int]) -> list[int]:
        left = []
        for slot in slots:
            number = self._numbers[slot]
            if number >= 0:
                self.count -= 1
                self.per_task[self.task_names[self._tasks[slot]]] -= 1
                left.append(number)
            self._numbers[slot] = _EMPTY
        return left

    # ------------------------------------------------------------------ state

    def state_dict(self, is_erased: Callable[[int], bool]) -> tuple[list[int], dict[str, Any]]:
        """Returns the records of the state (those in the slots, then other held ones), and the state itself.

        Args:
            is_erased: gets a record's number; an erased one is not held any more.
        """
        numbers = list(self.numbers)
        stored = set(numbers)
        held = [number for number in self.held or () if number in stored or not is_erased(number)]
        numbers += [number for number in held if number not in stored]
        positions = {number: position for position, number in enumerate(numbers)}
        return numbers, {
            **self._selection.state_dict(list(self.filled())),
            "tasks": torch.tensor(self.tasks.tolist(), dtype=torch.int32),
            "task_names": list(self.task_names),
            "held": None if self.held is None else as_numbers([positions[number] for number in held]),
        }

    def load_state_dict(self, state: dict[str, Any], numbers: Tensor) -> None:
        """Restores :meth:`state_dict`.

        Args:
            state: the state of slots with the same budget.
            numbers: the records, in the order that :meth:`state_dict` gave.
        """
        self._selection.load_state_dict(state)
        self.count = len(state["slots"])  # records after these are held, but in no slot
        self._numbers = spread("q", state, numbers[: self.count], _EMPTY)
        self._tasks, self.task_names = spread("i", state, state["tasks"]), list(state["task_names"])
        self.per_task = Counter(self.task_names[task] for task in self.tasks)
        if state["held"] is not None:
            self.held = array("q", numbers[state["held"]].tolist())
