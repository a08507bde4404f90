"""``strength="auto"``: the strength at which a penalty has a stated share of the task's own pull."""

from __future__ import annotations

import math
from typing import Any

FIRST_CHOICE = 4


class AutoStrength:
    """Chooses ``strength = share · ‖what the task wants‖ / ‖what a penalty of strength 1 wants‖`` at a few steps.

    Only what the present task and the stored importance give is looked at, never the future. At a task's first step the
    weights are at the anchor and a penalty wants nothing, so the strength is chosen after 4 steps, and again whenever
    the number of steps has grown by half: 6, 9, 13 …. Between two choices the weights move, and the share moves with
    them (up to twice the stated one while the learning rate warms up). Until a later task's first choice the last one
    holds.

    The share rises where a task saturates: a task that is learnt nearly perfectly has a gradient next to nothing, and a
    tenth of that protects nothing. With ``g`` what the task wants now and ``G`` the most that it wanted at a choice so
    far, the penalty gets ``min(1, share · G / 2g) · G / 2`` as soon as ``g`` is below ``G / 2``: the share grows in
    proportion to the fall of the task's pull, and the penalty ends at no more than half of the largest pull.

    Args:
        share: the share, above 0.

    Attributes:
        value: the strength in use; 0 before the first choice.
        largest: ``G``, of the present task.
        chosen: all choices: task, step in the task, strength.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.value = 0.0
        self.largest = 0.0
        self.next = FIRST_CHOICE
        self.chosen: list[dict[str, Any]] = []

    def begin_task(self) -> None:
        """A task starts: its first choice comes after a few steps, and what earlier tasks wanted does not count."""
        self.next, self.largest = FIRST_CHOICE, 0.0

    def is_due(self, steps: int) -> bool:
        """Tells if the strength is to be chosen after so many steps of the task."""
        return steps >= self.next

    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        """Chooses the strength.

        Args:
            wanted: norm of what the task wants: its gradient, or the optimizer's step per learning rate.
            pull: norm of what the penalty wants at strength 1, in the same unit.
            task: the task's name.
            steps: number of steps it has taken.
        """
        self.next = steps + 1  # after an overflow the next step is as good
        if not (math.isfinite(wanted) and wanted > 0 and pull > 0):
            return
        self.largest = max(self.largest, wanted)
        half = self.largest / 2
        force = self.share * wanted if wanted >= half else min(1.0, self.share * half / wanted) * half
        value = force / pull
        if math.isfinite(value) and value > 0:
            self.value = value
            self.next = max(steps + 1, steps * 3 // 2)
            self.chosen.append({"task": task, "step": steps, "strength": value})

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        chosen = [dict(choice) for choice in self.chosen]
        return {"value": self.value, "largest": self.largest, "next": self.next, "chosen": chosen}

    def load(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.value, self.next, self.chosen = state["value"], state["next"], list(state["chosen"])
        self.largest = state.get("largest", 0.0)  # earlier checkpoints do not have it
