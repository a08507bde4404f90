"""The selection in a buffer: slots, each with a group, a key and a cost, within a budget."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.buffers.store import as_numbers


class Selection:
    """The rule of :mod:`~lightning_cl.buffers.policies`: the largest group loses its largest key.

    28 bytes per slot. A choice takes O(log n), a rejection O(1).

    Args:
        capacity: the budget.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # One entry per slot, taken or free.
        self._keys, self._costs, self._groups = array("d"), array("q"), array("i")
        self._free: list[int] = []
        # One entry per group: its name, its slots, what they cost, and the key from which on nothing is taken in.
        self._names: list[str] = []
        self._heaps: list[LargestFirst] = []
        self._used: list[int] = []
        self._limits: list[float] = []

    def choose(self, group: str, key: float, cost: int) -> tuple[int | None, list[int]]:
        """Decides on a newcomer.

        Args:
            group: what it competes in.
            key: the smaller, the more it is to stay.
            cost: what it takes of the budget.

        Returns:
            its slot, or None if it has to stay out, and the slots that others had to leave.
        """
        number = self._number_of(group)
        if key >= self._limits[number]:
            return None, []
        gone: list[int] = []
        total = sum(self._used) + cost
        self._used[number] += cost
        while total > self._capacity:
            largest = max(range(len(self._used)), key=self._used.__getitem__)
            heap = self._heaps[largest]
            if largest == number and key >= heap.largest():  # the newcomer itself has to go
                self._limits[number] = min(self._limits[number], key)
                self._used[number] -= cost
                return None, gone
            slot = heap.pop()
            self._limits[largest] = min(self._limits[largest], self._keys[slot])
            total -= self._costs[slot]
            self._leave(slot)
            gone.append(slot)
        return self._enter(number, key, cost), gone

    def release(self, slots: Sequence[int]) -> None:
        """Frees slots for other reasons than the rule's; later samples may take them."""
        for group, heap in enumerate(self._heaps):
            mine = {slot for slot in slots if self._groups[slot] == group}
            if mine:
                heap.remove(mine)
        for slot in slots:
            self._leave(slot)

    def _number_of(self, group: str) -> int:
        if group not in self._names:
            self._names.append(group)
            self._heaps.append(LargestFirst(self._keys))
            self._used.append(0)
            self._limits.append(math.inf)
        return self._names.index(group)

    def _enter(self, group: int, key: float, cost: int) -> int:
        if self._free:
            slot = self._free.pop()
            self._keys[slot], self._costs[slot], self._groups[slot] = key, cost, group
        else:
            slot = len(self._keys)
            self._keys.append(key)
            self._costs.append(cost)
            self._groups.append(group)
        self._heaps[group].push(slot)
        return slot

    def _leave(self, slot: int) -> None:
        self._free.append(slot)
        self._used[self._groups[slot]] -= self._costs[slot]

    # ------------------------------------------------------------------ state

    def state_dict(self, slots: Sequence[int]) -> dict[str, Any]:
        """Everything of the slots that are taken, and which others there are: what is drawn may depend on it."""

        def column(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor([values[slot] for slot in slots], dtype=dtype)

        return {
            "slots": as_numbers(slots),
            "free": as_numbers(self._free),
            "keys": column(self._keys, torch.float64),
            "costs": column(self._costs, torch.int64),
            "groups": column(self._groups, torch.int32),
            "names": list(self._names),
            "limits": list(self._limits),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        slots, self._free = state["slots"].tolist(), state["free"].tolist()
        self._keys, self._costs = spread("d", state, state["keys"]), spread("q", state, state["costs"])
        self._groups = spread("i", state, state["groups"])
        self._names, self._limits = list(state["names"]), list(state["limits"])
        members: list[list[int]] = [[] for _ in self._names]
        self._used = [0] * len(self._names)
        for slot in slots:
            members[self._groups[slot]].append(slot)
            self._used[self._groups[slot]] += self._costs[slot]
        self._heaps = [LargestFirst(self._keys, mine) for mine in members]


class LargestFirst:
    """A heap that gives the slot with the largest key, in O(log n).

    Its keys are in one flat array: 12 bytes per slot, instead of about a hundred for tuples.

    Args:
        keys: the key of every slot, shared with the owner.
        slots: the slots in the heap at first.
    """

    def __init__(self, keys: array[float], slots: Iterable[int] = ()) -> None:
        self._keys = keys
        # A list in falling order is a heap.
        self._heap = array("i", sorted(slots, key=lambda slot: -keys[slot]))

    def __len__(self) -> int:
        return len(self._heap)

    def largest(self) -> float:
        """Returns the largest key; −∞ if the heap is empty."""
        return self._keys[self._heap[0]] if self._heap else -math.inf

    def push(self, slot: int) -> None:
        """Adds a slot."""
        heap, keys = self._heap, self._keys
        heap.append(slot)
        key, at = keys[slot], len(heap) - 1
        while at and keys[heap[(at - 1) >> 1]] < key:
            heap[at] = heap[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at] = slot

    def pop(self) -> int:
        """Takes out the slot with the largest key."""
        heap, keys = self._heap, self._keys
        top, last = heap[0], heap.pop()
        size = len(heap)
        if size:
            key, at = keys[last], 0
            while (child := 2 * at + 1) < size:
                if child + 1 < size and keys[heap[child + 1]] > keys[heap[child]]:
                    child += 1
                if keys[heap[child]] <= key:
                    break
                heap[at] = heap[child]
                at = child
            heap[at] = last
        return top

    def remove(self, gone: set[int]) -> None:
        """Takes out some slots; O(n log n)."""
        self._heap = array("i", sorted((s for s in self._heap if s not in gone), key=lambda slot: -self._keys[slot]))


def spread(kind: str, state: dict[str, Any], values: Tensor, empty: int = 0) -> array[Any]:
    """The values of taken slots, in a column over all slots.

    Args:
        kind: type of the column.
        state: the result of :meth:`Selection.state_dict`, which lists the taken slots.
        values: one value for each taken slot.
        empty: the value of the free slots.
    """
    slots = state["slots"].tolist()
    whole = np.full(len(slots) + len(state["free"]), empty, dtype=kind)
    whole[slots] = values.numpy()
    return array(kind, whole.tobytes())
