"""``strength="auto"``: the strength at which a penalty has a stated share of the task's own pull."""

from __future__ import annotations

import math
from typing import Any


class AutoStrength:
    """Chooses ``strength = share · W / ‖what a penalty of strength 1 wants‖`` at a few steps of each task.

    ``W`` is the largest norm so far in this task of what the task wants: of its gradient, or of the optimizer's step
    per learning rate. While a task's own pull stays about as large as at its start, the penalty has the stated share of
    it. Where a task saturates (it is learnt nearly perfectly, and its gradient goes to zero) the share rises: a tenth
    of nothing would protect nothing.

    Only what the present task and the stored importance give is looked at, never the future. The strength is chosen in
    steps 0 to 4, and again whenever the number of steps has grown by half: 6, 9, 13 …. Where the weights are at the
    anchor, as in the first step of most tasks, a penalty wants nothing and nothing is chosen. Between two choices the
    weights move, and the share moves with them, up to twice the stated one while the learning rate warms up.

    Args:
        share: the share, above 0.

    Attributes:
        value: the strength in use; 0 before the first choice.
        reference: ``W``.
        chosen: all choices: task, step in the task, strength.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.value = 0.0
        self.reference = 0.0
        self.next = 0
        self.chosen: list[dict[str, Any]] = []

    def begin_task(self) -> None:
        """A task starts: what earlier tasks wanted does not count for it."""
        self.next, self.reference = 0, 0.0

    def is_due(self, steps: int) -> bool:
        """Tells if the strength is to be chosen after so many steps of the task."""
        return steps >= self.next

    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        """Chooses the strength.

        Args:
            wanted: norm of what the task wants: its gradient, or the optimizer's step per learning rate.
            pull: norm of what the penalty wants at strength 1, in the same unit.
            task: the task's name.
            steps: how many steps it has taken.
        """
        if math.isfinite(wanted):
            self.reference = max(self.reference, wanted)
        value = self.share * self.reference / pull if pull > 0 and math.isfinite(wanted) else 0.0
        self.next = steps + 1  # after an overflow, or at the anchor, the next step is as good
        if math.isfinite(value) and value > 0:
            self.value = value
            self.next = max(steps + 1, steps * 3 // 2)
            self.chosen.append({"task": task, "step": steps, "strength": value})

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        chosen = [dict(choice) for choice in self.chosen]
        return {"value": self.value, "reference": self.reference, "next": self.next, "chosen": chosen}

    def load(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.value, self.next, self.chosen = state["value"], state["next"], list(state["chosen"])
        self.reference = state.get("reference", 0.0)  # checkpoints of before do not have it
