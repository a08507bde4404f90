"""A continual-learning method: a callback that answers some of the :mod:`~lightning_cl.core.questions`."""

from __future__ import annotations

import lightning as L
from typing_extensions import override

from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.core.questions import Questions


class ContinualCallback(Questions):
    """Base of all methods. It gives the Trainer a coordinator, which asks the questions.

    A method overrides the questions that it answers, and none of Lightning's hooks for the same moments. A method that
    overrides ``setup`` calls ``super().setup``. The base class itself needs no memory and no time.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        TaskCoordinator.of(trainer)
