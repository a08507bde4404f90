"""Base of callbacks that ask a language model something before training and after every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.core.method import ContinualCallback
from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.generation import generator_of
from lightning_cl.random_state import untouched_random_state


class BoundaryQuestions(ContinualCallback):
    """Chooses the moments: once before training, when the model is built, and once after every task.

    Subclasses answer :meth:`known` and :meth:`ask`.
    """

    def known(self) -> Mapping[int, Any]:
        """Returns what was found, by the number of trained tasks."""
        raise NotImplementedError

    def ask(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, trained: int) -> None:
        """Asks, and keeps what was found.

        Args:
            trainer: the Trainer, between its loops or at a task's start.
            pl_module: its module.
            data: the tasks, set up.
            trained: number of trained tasks.
        """
        raise NotImplementedError

    def model_of(self, pl_module: L.LightningModule, data: TaskDataModule, lacking: str) -> Any:
        """Returns the model that is asked.

        Raises:
            MisconfigurationException: if there is none, with the words `lacking`, or no tokenizer.
        """
        name, model = type(self).__name__, generator_of(pl_module)
        if model is None:
            raise MisconfigurationException(f"{name}: nothing in {type(pl_module).__name__} {lacking}")
        if not hasattr(data.tokenizer, "decode"):
            raise MisconfigurationException(f"{name}: needs a tokenizer: give TaskDataModule(tokenizer=…)")
        return model

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = self.run.data
        if data is not None and self.task is not None and self.task.index == 0 and 0 not in self.known():
            with untouched_random_state():
                self.ask(trainer, pl_module, data, 0)

    @override
    def at_boundary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        ckpt_path: str | None = None,
    ) -> None:
        if trained in self.known() or ckpt_path is not None:
            return
        if trainer.fast_dev_run and self.known():  # type: ignore[attr-defined]
            return  # one answer has shown that it works
        if trained == 0 and not (data.is_set_up and generator_of(pl_module)):
            return  # nothing is built yet, so `on_task_start` asks
        self.ask(trainer, pl_module, data, trained)
