"""Base of strengths that are chosen while a task trains; a kind answers the moments that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from lightning_cl.core.questions import Need
from lightning_cl.core.run_state import RunState
from lightning_cl.passes.logits import OutputsFunction

FIRST_CHOICE = 4
"""Steps of a task before the first choice."""


class ChosenStrength:
    """A strength that is chosen again and again while a task trains.

    Attributes:
        value: the present strength.
        largest: the task's largest pull at any choice in the present task.
        chosen: all choices, each with its task, step in the task, and strength.
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.largest = value, 0.0
        self.chosen: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ moments

    def set_up(self, trainer: L.Trainer, outputs: OutputsFunction | None) -> None:
        """Checks the Trainer, before any training; `outputs` is the method's own function for logits."""

    def begin_sequence(self) -> None:
        """A new sequence starts."""

    def begin_task(self) -> None:
        """A task starts."""

    def keep_reference(self, pl_module: L.LightningModule, task: int, needed: bool) -> None:
        """A task starts with these weights; `needed` is False if the method has nothing to hold in it."""

    def place(self, trainer: L.Trainer, pl_module: L.LightningModule, run: RunState) -> None:
        """Training starts or resumes."""

    def observe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Measures what the next choice needs, when it is due; returns what is to be logged."""
        return {}

    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str) -> None:
        """A task ends, and the anchor is still that of the task before."""

    # ------------------------------------------------------------------ the choice

    def is_due(self, steps: int) -> bool:
        """Tells if the strength is to be chosen after `steps` steps of the task."""
        raise NotImplementedError

    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        """Chooses the strength.

        Args:
            wanted: norm of the task's pull; 0 if the method has no such thing.
            pull: norm of the penalty's pull at strength 1, in the same unit; 0 if it has none.
            task: the task's name.
            steps: number of steps that the task has taken.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ state and report

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        raise NotImplementedError

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Returns the bytes of what is kept from task to task."""
        return 0

    def report(self) -> dict[str, Any]:
        """Returns the choices, and the settings that they follow."""
        raise NotImplementedError

    def sentences(self) -> list[str]:
        """Returns what the report says of the choices."""
        return []

    def advice(self, owner: str, need: Need, diagnosis: Sequence[dict[str, Any]]) -> str | None:
        """Returns what could be changed of the setting that the choices follow."""
        raise NotImplementedError
