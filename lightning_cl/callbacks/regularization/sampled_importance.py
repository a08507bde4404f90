"""Penalties whose importance needs a pass over samples of the task that has ended."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_cl.callbacks.regularization.quadratic import Apply, QuadraticPenalty, StateDevice, StateDtype, Strength
from lightning_cl.core.questions import EndCost
from lightning_cl.passes.task_samples import TaskSamples, check_samples
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import TaskPosition

_PER_SAMPLE = 1.2  # cost of a pass with single gradients, in training passes over the same samples


class SampledImportance(QuadraticPenalty):
    """A quadratic penalty whose importance is measured on samples at a task's end.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        samples: number of samples of a task to measure on; all samples if the task has fewer.
        batch_size: samples measured at once; default: the training loader's.
        last_task: True measures the last task of a sequence too. False saves that pass. If tasks are added later, the
            pass is made when the first of them starts, on the last task's data, with the same result.
        apply: ``gradient`` or ``proximal``.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.

    Raises:
        ValueError: if an argument is out of its range.
    """

    ends_long = True
    measures = "importance"
    """Name of the measured quantity."""

    def __init__(
        self,
        strength: Strength,
        samples: int,
        batch_size: int | None,
        last_task: bool,
        apply: Apply,
        share: float,
        state_dtype: StateDtype,
        state_device: StateDevice,
    ) -> None:
        super().__init__(strength, apply, share, state_dtype, state_device)
        check_samples(samples, batch_size)
        if not isinstance(last_task, bool):
            raise ValueError(f"last_task={last_task!r}: expected True or False")
        self.samples, self.batch_size, self.last_task = samples, batch_size, last_task
        self._owed: dict[str, Any] | None = None  # the task that was not measured, and the penalty's effect in it
        self._loader: Any = None  # loader of that task, while its measurement is made up for

    def task_samples(self, trainer: L.Trainer, label: str) -> TaskSamples:
        """Returns the samples of the task that is measured."""
        assert self.task is not None
        count = 1 if trainer.fast_dev_run else self.samples  # type: ignore[attr-defined]
        return TaskSamples(trainer, count, self.task.index, label, loader=self._loader, batch_size=self.batch_size)

    # ------------------------------------------------------------------ the last task

    @override
    def on_sequence_start(self) -> None:
        super().on_sequence_start()
        if self._owed is not None:
            rank_zero_warn(
                f"{type(self).__name__}(last_task=False): the last task of the sequence before,"
                f" {self._owed['name']!r}, was not measured, and its data is not there any more: it is not protected"
            )
            self._owed = None

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._owed is not None:
            self._make_up(trainer, pl_module, self._owed)
        super().on_task_start(trainer, pl_module)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        if self.last_task or not self.run.driven or not _is_last(self.task):
            super().on_task_end(trainer, pl_module)
            return
        held = self._describe_hold(trainer, pl_module)
        self._owed = {"index": self.task.index, "name": self.task.name, "count": self.task.count, "held": held}
        rank_zero_info(f"{type(self).__name__}(last_task=False): {self.task} is measured when another task is added")

    def _make_up(self, trainer: L.Trainer, pl_module: L.LightningModule, owed: dict[str, Any]) -> None:
        """Measures the task now: the weights are unchanged since its end, and its data is still available."""
        data, now = self.run.data, self.task
        assert data is not None
        with untouched_random_state():
            self._loader = data.train_loader(data.trained_tasks[owed["index"]])
        self.task = TaskPosition(owed["index"], owed["name"], owed["count"])
        try:
            self.update_importance(trainer, pl_module)
            if self._diagnosis:
                self._diagnosis[-1].update(owed["held"])
        finally:
            self._loader, self.task = None, now
        self._owed = None

    # ------------------------------------------------------------------ plan and state

    @override
    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        if not self.last_task and _is_last(task):
            return None
        samples = TaskSamples(trainer, self.samples, task.index, "", loader=loader, batch_size=self.batch_size)
        return EndCost(self.measures, samples.count_samples(), samples.count_batches(), _PER_SAMPLE)

    @override
    def continual_state(self) -> dict[str, Any]:
        return super().continual_state() | {"owed": None if self._owed is None else dict(self._owed)}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self._owed = state.get("owed")  # older checkpoints do not have it


def _is_last(task: TaskPosition) -> bool:
    return task.index + 1 == task.count
