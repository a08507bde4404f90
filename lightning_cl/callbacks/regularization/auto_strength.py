"""Choice of ``strength="auto"``: the penalty's pull gets a stated share of the task's pull."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from lightning_cl.callbacks.regularization.chosen_strength import FIRST_CHOICE, ChosenStrength
from lightning_cl.callbacks.regularization.diagnosis import advice_of
from lightning_cl.core.questions import Need


class AutoStrength(ChosenStrength):
    """Chooses ``strength = share · ‖the task's pull‖ / ‖the pull of a penalty of strength 1‖`` at a few steps.

    Only the present task and the stored importance are used, never later tasks. At a task's first step the weights are
    at the anchor, and the penalty's pull is 0. So the strength is chosen after 4 steps, and again whenever the number
    of steps has grown by half: 6, 9, 13 …. Between two choices the weights move, and the share changes with them (up to
    twice the stated one while the learning rate warms up). Before a later task's first choice the last strength stays
    in use.

    The share rises when a task saturates: a task that is learnt nearly perfectly has a gradient near 0, and a tenth of
    that protects nothing. ``g`` is the task's present pull, and ``G`` the largest pull at any choice so far. As soon as
    ``g`` is below ``G / 2``, the penalty gets ``min(1, share · G / 2g) · G / 2``. So the share grows as the task's pull
    falls, and the penalty gets at most half of the largest pull.

    Args:
        share: the penalty's pull divided by the task's pull, above 0.

    Attributes:
        value: the present strength; 0 before the first choice.
        largest: ``G`` of the present task.
        chosen: all choices, each with its task, step in the task, and strength.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.next = FIRST_CHOICE

    @override
    def begin_task(self) -> None:
        # The pull of earlier tasks does not count.
        self.next, self.largest = FIRST_CHOICE, 0.0

    @override
    def is_due(self, steps: int) -> bool:
        return steps >= self.next

    @override
    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        self.next = steps + 1  # after an overflow the strength is chosen at the next step
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

    @override
    def state(self) -> dict[str, Any]:
        chosen = [dict(choice) for choice in self.chosen]
        return {"value": self.value, "largest": self.largest, "next": self.next, "chosen": chosen}

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        self.value, self.next, self.chosen = state["value"], state["next"], list(state["chosen"])
        self.largest = state.get("largest", 0.0)  # older checkpoints do not have it

    @override
    def report(self) -> dict[str, Any]:
        return {"chosen": list(self.chosen), "share": self.share}

    @override
    def advice(self, owner: str, need: Need, diagnosis: Sequence[dict[str, Any]]) -> str | None:
        return advice_of(owner, need, diagnosis, "share", self.share)
