"""``strength="auto"``: the strength at which a penalty has a stated share of the task's own pull."""

from __future__ import annotations

import math
from typing import Any

FIRST_CHOICE = 4


class AutoStrength:
    """Chooses ``strength = share · ‖what the task wants‖ / ‖what a penalty of strength 1 wants‖`` at a few steps.

    Only what the present task and the stored importance give is looked at, never the future. At a task's first step the
    weights are at the anchor and a penalty wants nothing, so the strength is chosen after 4 steps, and again whenever
    the steps have grown by half: 6, 9, 13 …. The weights move on between two choices, and the share grows with them (up
    to twice while the learning rate warms up). Until a later task's first choice the last one holds.

    Args:
        share: the share, above 0.

    Attributes:
        value: the strength in use; 0 before the first choice.
        chosen: all choices: task, step in the task, strength.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.value = 0.0
        self.next = FIRST_CHOICE
        self.chosen: list[dict[str, Any]] = []

    def begin_task(self) -> None:
        """A task starts: its first choice comes after a few steps."""
        self.next = FIRST_CHOICE

    def is_due(self, steps: int) -> bool:
        """Whether the strength is to be chosen after so many steps of the task."""
        return steps >= self.next

    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        """Chooses the strength.

        Args:
            wanted: norm of what the task wants: its gradient, or the optimizer's step.
            pull: norm of what the penalty wants at strength 1, in the same unit.
            task: the task's name.
            steps: how many steps it has taken.
        """
        value = self.share * wanted / pull if pull > 0 else 0.0
        self.next = steps + 1  # after an overflow the next step is as good
        if math.isfinite(value) and value > 0:
            self.value = value
            self.next = max(steps + 1, steps * 3 // 2)
            self.chosen.append({"task": task, "step": steps, "strength": value})

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "next": self.next, "chosen": [dict(choice) for choice in self.chosen]}

    def load(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.value, self.next, self.chosen = state["value"], state["next"], list(state["chosen"])
