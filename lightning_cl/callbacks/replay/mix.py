"""Mixing a buffer into a task's loader, and the checks before it."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.run_state import RunState
from lightning_cl.data.batch_source import TaskBatches, TaskLength
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.data.mixing.ratio import check_sum, curve_of
from lightning_cl.data.mixing.replayed import Mix


def check_plannable(loader: Any, name: str, task: str | None = None) -> None:
    """Checks that a loader's samples can be reached by index, and mixed into its batches.

    Raises:
        MisconfigurationException: saying why not, and what can.
    """
    reason = None if isinstance(loader, TaskBatches) else why_not_plannable(loader)
    if reason is not None:
        raise MisconfigurationException(
            f"{name} cannot mix into the training loader{f' of task {task!r}' if task else ''}: {reason}. It needs a"
            " torch DataLoader over a map-style data set (with __len__ and __getitem__) and a batch_size"
        )


def check_together(run: RunState) -> None:
    """Checks that all callbacks that replay leave room for new samples, in every task, and mix in one way.

    Raises:
        MisconfigurationException: if not; before anything is trained.
    """
    methods: list[Any] = [m for m in run.methods if m.replays and hasattr(m, "ratio")]
    names = " and ".join(type(method).__name__ for method in methods)
    tasks = run.names
    # `1/t` counts the tasks that an earlier run has left in the buffer, too.
    earlier = [_earlier_tasks(method, tasks) for method in methods]
    try:
        for number in range(1, len(tasks) + 1) if tasks else (2,):
            check_sum([curve_of(method.ratio, number + e) for method, e in zip(methods, earlier, strict=True)])
    except ValueError as error:
        raise MisconfigurationException(f"{names}: {error}") from error
    if len({method.mode for method in methods}) > 1:
        modes = ", ".join(f"{type(method).__name__}(mode={method.mode!r})" for method in methods)
        raise MisconfigurationException(f"mode: {modes}: expected the same for all callbacks that replay")


def _earlier_tasks(method: Any, tasks: list[str]) -> int:
    """Counts the tasks of other runs in a buffer; in a plain fit, all but the last."""
    if not method.takes_in:
        return 0
    stored = set(method.buffer.task_names)
    return len(stored - set(tasks)) if tasks else max(len(stored) - 1, 0)


def mix_into_loader(trainer: L.Trainer, run: RunState, loader: TaskBatches, mix: Mix, owner: str) -> None:
    """Mixes a buffer into a task's loader.

    Args:
        trainer: inside ``fit``.
        run: its state.
        loader: of the task.
        mix: what, and how much of it.
        owner: the callback's name, for messages.

    Raises:
        MisconfigurationException: if the share changes over the task and nobody can know how long the task is, or if
            the loader cannot take it.
    """
    try:
        length = TaskLength(_epochs_of_task(trainer, run), _batches_of_task(trainer, run), trainer.limit_train_batches)
        loader.mix_in(mix, length)
    except ValueError as error:
        raise MisconfigurationException(f"{owner}({error})") from error


def _epochs_of_task(trainer: L.Trainer, run: RunState) -> float:
    limits = run.limits
    epochs = limits.max_epochs if limits is not None else trainer.max_epochs
    return math.inf if epochs is None or epochs == -1 else max(float(epochs), 1.0)


def _batches_of_task(trainer: L.Trainer, run: RunState) -> float | None:
    """The most batches that this task is trained on; None if only its data ends it."""
    limits = run.limits
    steps = limits.max_steps if limits is not None else trainer.max_steps
    return None if steps is None or steps == -1 else float(steps * trainer.accumulate_grad_batches)
