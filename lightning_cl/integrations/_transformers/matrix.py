"""The matrix of every task after every task, measured by ``trainer.evaluate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

import lightning_cl.callbacks as ours
from lightning_cl.data.measured_on import content_hash
from lightning_cl.evaluation import build_report, format_report, write_report
from lightning_cl.functional.retention import Mode, Preset, with_worst
from lightning_cl.passes.heads import evaluated
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import Task


class TaskMatrix(ours.TaskMatrix):
    """The table, the scores and the report of :class:`lightning_cl.TaskMatrix`, under this package's ``fit_tasks``.

    Each entry is what ``trainer.evaluate`` returns under `monitor` for that task's ``val``. ``eval_loss`` is a mean of
    the losses of batches, so it depends a little on ``per_device_eval_batch_size``.

    Args:
        monitor: the name of the metric, with the Trainer's prefix ``eval_``.
        mode: ``min`` if lower is better, ``max`` if higher is.
        preset: whose definition of transfer: ``gem``, ``trace`` or ``sapt``.
        reference: the score that each task can reach (see :class:`lightning_cl.TaskMatrix`).

    Attributes:
        matrix: ``[rows, tasks]``: row 0 is before any training, row i after the i-th trained task.
        tasks: the names of the columns.

    Raises:
        ValueError: if mode or preset is none of the above.
    """

    def __init__(
        self,
        monitor: str = "eval_loss",
        mode: Mode = "min",
        preset: Preset = "gem",
        reference: dict[str, float | str] | str | None = None,
    ) -> None:
        super().__init__(monitor, mode, preset, reference)

    def measure(self, trainer: Any, tasks: list[Task], trained: int) -> None:
        """Measures a row; the Trainer's state, the model's modes and the random states stay as they were.

        Args:
            trainer: a ``transformers.Trainer``.
            tasks: all tasks, in order.
            trained: how many of them have been trained.

        Raises:
            ValueError: if a task has nothing to measure it on, or there is no such metric.
        """
        start = time.monotonic()
        self.tasks, self.watched = [task.name for task in tasks], [task.name for task in tasks if task.watched]
        rows = torch.full((trained + 1, len(tasks)), torch.nan, dtype=torch.float64)
        rows[: len(self.matrix)] = self.matrix[: trained + 1] if len(self.matrix) else rows[:0]
        history = list(trainer.state.log_history)
        with untouched_random_state(), evaluated(trainer.model):
            for column, task in enumerate(tasks):
                if task.val is None:
                    raise ValueError(f"task {task.name!r}: there is nothing to measure it on: give Task(val=…)")
                metrics = trainer.evaluate(task.val)
                if self.monitor not in metrics:
                    raise ValueError(
                        f"monitor={self.monitor!r}: trainer.evaluate returns no such metric; it returns"
                        f" {sorted(metrics)}"
                    )
                rows[trained, column] = with_worst(torch.tensor(float(metrics[self.monitor])).double(), self.mode)
        trainer.state.log_history[:] = history
        self.matrix = rows
        self.measured_on = {
            task.name: _measured_on(task.val, trainer.args.per_device_eval_batch_size) for task in tasks
        }
        self.seconds += time.monotonic() - start

    def write(self, folder: Path | None, methods: list[Any], costs: list[dict[str, float]], final: bool) -> None:
        """Writes the report as under a Lightning Trainer, and prints it after the last task.

        Args:
            folder: the run's folder; None: nothing is written.
            methods: the callbacks, each with its name.
            costs: of each trained task.
            final: True after the last task.
        """
        self._methods = methods
        report = self.last_report = build_report(self, costs, methods)
        if folder is not None:
            write_report(report, folder, page=final)
        if final:
            rank_zero_info(format_report(report, folder))


def _measured_on(dataset: Any, batch_size: int) -> dict[str, Any]:
    """Describes a task's data as :func:`lightning_cl.data.measured_on.measured_on` does."""
    unknown = dict.fromkeys(("packing", "max_length", "template"))
    return {
        "data": content_hash(dataset),
        "samples": [len(dataset)],
        "batches": [-(-len(dataset) // batch_size)],
        "limit": "1.0",
        "batch_size": [batch_size],
        "processes": 1,
        **unknown,
    }
