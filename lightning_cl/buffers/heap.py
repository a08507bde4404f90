"""A heap over slots, with its keys in one flat array: 12 bytes per slot, where tuples would take a hundred."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable


class LargestFirst:
    """Gives the slot with the largest key; O(log n).

    Args:
        keys: the key of every slot, shared with the owner.
        slots: what is in it at first.
    """

    def __init__(self, keys: array[float], slots: Iterable[int] = ()) -> None:
        self._keys = keys
        # A list in falling order is a heap.
        self._heap = array("i", sorted(slots, key=lambda slot: -keys[slot]))

    def __len__(self) -> int:
        return len(self._heap)

    def largest(self) -> float:
        """The largest key; −∞ without slots."""
        return self._keys[self._heap[0]] if self._heap else -math.inf

    def push(self, slot: int) -> None:
        """Adds a slot."""
        heap, keys = self._heap, self._keys
        heap.append(slot)
        key, place = keys[slot], len(heap) - 1
        while place and keys[heap[(place - 1) >> 1]] < key:
            heap[place] = heap[(place - 1) >> 1]
            place = (place - 1) >> 1
        heap[place] = slot

    def pop(self) -> int:
        """Takes out the slot with the largest key."""
        heap, keys = self._heap, self._keys
        top, last = heap[0], heap.pop()
        size = len(heap)
        if size:
            key, place = keys[last], 0
            while (child := 2 * place + 1) < size:
                if child + 1 < size and keys[heap[child + 1]] > keys[heap[child]]:
                    child += 1
                if keys[heap[child]] <= key:
                    break
                heap[place] = heap[child]
                place = child
            heap[place] = last
        return top

    def remove(self, gone: set[int]) -> None:
        """Takes out some slots; O(n log n)."""
        self._heap = array("i", sorted((s for s in self._heap if s not in gone), key=lambda slot: -self._keys[slot]))
