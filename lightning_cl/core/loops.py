"""Changes to Lightning's loops; no other file makes any. All of it was checked with Lightning 2.6.6.

* A repeated ``fit`` trains nothing and raises no error, since the epochs of the last fit count. So they are reset.
* ``max_steps`` counts the steps of all fits. So it is raised for each task, after optimizers and schedules were made.
* Lightning gets the training loader from one source. So this source adds the samples that methods mix in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.exceptions import MisconfigurationException, _TunerExitException
from typing_extensions import override

from lightning_cl.core.questions import Questions
from lightning_cl.core.run_state import Limits
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.data.loader import TaskLoader
from lightning_cl.lightning_internals import shards_loaders
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import Task


class _TasksSteps(int):
    """Step at which a task ends, counted over all tasks; it is shown as the task's own number of steps."""

    own: int

    def __new__(cls, first_step: int, own: int) -> _TasksSteps:
        steps = super().__new__(cls, first_step + own)
        steps.own = own
        return steps

    def __repr__(self) -> str:
        return str(self.own)


@contextmanager
def restored_limits(trainer: L.Trainer) -> Iterator[Limits]:
    """Gives the Trainer's own limits, and restores them afterwards, also after an exception."""
    accumulated = trainer.accumulate_grad_batches
    limits = Limits(trainer.max_epochs, trainer.max_steps, trainer.fit_loop.min_steps, accumulated)
    try:
        yield limits
    finally:
        loop = trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = limits.max_epochs, limits.max_steps
        loop.epoch_loop.min_steps = limits.min_steps
        trainer.accumulate_grad_batches = limits.accumulated


def limit_to_task(trainer: L.Trainer, task: Task, limits: Limits) -> Limits:
    """Sets ``max_epochs``, ``max_steps`` and ``min_steps`` of the coming fit to those of this task.

    Raises:
        MisconfigurationException: if the task would never end.
    """
    epochs, steps = limits.of_task(task)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        epochs, steps = 1, int(trainer.fast_dev_run)  # type: ignore[attr-defined]
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if steps == -1 and (epochs is None or epochs == -1) and not timed:
        raise MisconfigurationException(
            f"task {task.name!r} would never end: set Trainer(max_epochs=…) or max_steps, or the task's own"
        )
    loop, trainer.accumulate_grad_batches = trainer.fit_loop, limits.accumulated
    loop.epoch_progress.current.reset()
    loop.epoch_loop.batch_progress.current.reset()
    loop.epoch_loop.batch_progress.is_last_batch = False
    loop.max_epochs = epochs if epochs is not None else -1
    loop.epoch_loop.max_steps = steps
    return Limits(epochs, steps, limits.min_steps, limits.accumulated)


def plan_limits(trainer: L.Trainer, max_epochs: int | None, max_steps: int) -> None:
    """Restores the limits that a Trainer with ``fast_dev_run`` was made with; Lightning has overwritten them.

    A preflight's own limits come from :func:`limit_to_task`; these are for :func:`planned_steps`.
    """
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = max_epochs, max_steps


def planned_steps(trainer: L.Trainer, task: Task, batches: int | None) -> int | None:
    """Returns a task's optimizer steps outside of a preflight; None if they cannot be known.

    Args:
        trainer: the Trainer with ``fast_dev_run``. Its own limits are known only after :func:`plan_limits`.
        task: the task.
        batches: number of batches in an epoch; None for a stream.
    """
    known = (trainer.max_epochs, trainer.max_steps) != (1, int(trainer.fast_dev_run))  # type: ignore[attr-defined]
    limits = Limits(trainer.max_epochs, trainer.max_steps, None) if known else Limits(None, -1, None)
    epochs, steps = limits.of_task(task)
    return expected_steps(trainer, epochs, steps, batches)


def steps_of_current_task(trainer: L.Trainer, limits: Limits | None) -> int | None:
    """Returns the optimizer steps of the task that is being trained; None if nobody can know.

    Args:
        trainer: inside a fit.
        limits: bounds of the task; None: the Trainer's own.
    """
    epochs = limits.max_epochs if limits is not None else trainer.max_epochs
    steps = limits.max_steps if limits is not None else trainer.max_steps
    batches = trainer.num_training_batches
    return expected_steps(trainer, epochs, steps, int(batches) if math.isfinite(batches) else None)


def expected_steps(trainer: L.Trainer, epochs: int | None, steps: int, batches: int | None) -> int | None:
    """Returns the optimizer steps of a fit; None if they cannot be known.

    Args:
        trainer: gives the number of batches in a step.
        epochs: the most epochs; None or -1: no limit.
        steps: the most steps; -1: no limit.
        batches: number of batches in an epoch; None for a stream.
    """
    counts = [steps] if steps > 0 else []
    if epochs is not None and epochs > 0 and batches is not None:
        counts.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(counts, default=None)


def count_from(trainer: L.Trainer, limits: Limits, first_step: int) -> None:
    """Makes the loop count the steps of all tasks; call it after optimizers and schedules read the task's own."""
    loop = trainer.fit_loop.epoch_loop
    if limits.max_steps != -1:
        loop.max_steps = _TasksSteps(first_step, limits.max_steps)  # Lightning's closing line shows it
    if limits.min_steps is not None:
        loop.min_steps = first_step + limits.min_steps


def forget_progress(trainer: L.Trainer) -> None:
    """Resets progress, so that a checkpoint written now starts a fit at its first batch; the step number is kept."""
    loop = trainer.fit_loop
    loop.epoch_progress.reset()
    loop.epoch_loop.batch_progress.reset()
    loop.epoch_loop.scheduler_progress.reset()
    loop.epoch_loop.val_loop.batch_progress.reset()


def forget_restart(trainer: L.Trainer) -> None:
    """Makes Lightning treat a fit after a boundary as a new one, since none of its batches were trained.

    Lightning treats any checkpoint as one from inside a fit. If it has no progress, Lightning takes the first epoch of
    a short task as finished, and the batches come in the order of the second epoch.
    """
    loop = trainer.fit_loop
    # The fit loop's own `restarting` cannot be set to False where `max_steps` counts.
    loop._restarting = loop.epoch_loop.restarting = False


def load_weights(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Loads only a checkpoint's weights into the module that is being trained."""
    module = trainer.lightning_module
    call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)


def batches_in_flight(trainer: L.Trainer) -> int:
    """Returns the batches that were fetched but not yet trained on: one, while an exception is handled."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    result: int = progress.ready - progress.processed  # type: ignore[attr-defined]
    return result


def batches_of_open_window(trainer: L.Trainer) -> int:
    """Returns the batches whose gradients are accumulated for the next optimizer step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if progress.is_last_batch:
        return 0  # the last window of an epoch may be shorter
    result: int = progress.current.processed % trainer.accumulate_grad_batches  # type: ignore[attr-defined]
    return result


def batches_ready(trainer: L.Trainer) -> int:
    """Returns the number of batches of this epoch that Lightning has begun."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


class _LeftFit(_TunerExitException):
    """Ends a fit at once, without its last hooks; Lightning's tuner leaves it in this way too."""


def leave_fit() -> NoReturn:
    """Ends the running fit between two batches: ``trainer.fit`` returns, and nobody is told of a task's end."""
    raise _LeftFit


class _MixingSource(_DataLoaderSource):
    """Source of the Trainer's training loader, which lets the methods mix samples into it."""

    def __init__(self, source: _DataLoaderSource, trainer: L.Trainer, methods: list[Questions]) -> None:
        super().__init__(source.instance, source.name)
        self._trainer = trainer
        self.methods, self.checks = methods, True
        self.on_loader: Callable[[L.Trainer, Any], None] | None = None

    @override
    def dataloader(self) -> Any:
        loader = super().dataloader()
        if self.on_loader is not None:
            self.on_loader(self._trainer, loader)
        if self.checks:
            with untouched_random_state():
                for method in self.methods:
                    method.check_loader(loader, "of trainer.fit")
        methods = [method for method in self.methods if method.mixes]
        if not methods:
            return loader
        if not isinstance(loader, TaskBatches):
            ranks = _shards_of_lightning(self._trainer)
            if not ranks and self._trainer.world_size > 1:
                name = type(methods[0]).__name__
                raise MisconfigurationException(
                    f"Trainer(use_distributed_sampler=False): {name} would keep other samples on each rank; let"
                    " Lightning shard the loader"
                )
            loader = TaskLoader.from_dataloader(
                loader,
                rank=ranks.get("rank", 0),
                world_size=ranks.get("num_replicas", 1),
                broadcast=self._trainer.strategy.broadcast,
            )
        for method in methods:
            method.mix_into(self._trainer, loader)
        return loader


def let_methods_mix(
    trainer: L.Trainer, methods: list[Questions], check: bool, on_loader: Callable[[L.Trainer, Any], None]
) -> None:
    """Lets the methods add to the training loader when Lightning asks for it.

    Args:
        trainer: the Trainer before its fit.
        methods: the Trainer's methods.
        check: True lets the methods check the loader first (``fit_tasks`` has done so for all tasks).
        on_loader: is called first, with the user's loader.
    """
    source = trainer.fit_loop._data_source
    if not isinstance(source, _MixingSource):
        source = trainer.fit_loop._data_source = _MixingSource(source, trainer, methods)
    source.methods, source.checks, source.on_loader = methods, check, on_loader


def steps_of_task(trainer: L.Trainer) -> int | None:
    """Returns the optimizer steps of the coming fit, for schedules; None if they cannot be known.

    Use it in ``configure_optimizers``. Unlike ``trainer.estimated_stepping_batches`` it does not set up the data, which
    would lose the loader's position after a resume.
    """
    epochs, steps = trainer.max_epochs, trainer.max_steps
    by_epochs = None
    if epochs is not None and epochs > 0:
        with untouched_random_state():
            loader = trainer.fit_loop._data_source.dataloader()
        try:
            batches = len(loader)
        except TypeError:
            batches = None
        ranks = _shards_of_lightning(trainer)
        if batches is not None and why_not_plannable(loader) is None and ranks:
            batches = math.ceil(batches / ranks["num_replicas"])  # Lightning will shard it
        if batches is not None:
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    known = [count for count in (by_epochs, steps if steps > 0 else None) if count is not None]
    return min(known) if known else None


def _shards_of_lightning(trainer: L.Trainer) -> dict[str, int]:
    """Returns rank and number of ranks for Lightning's sharding of a plain loader; empty if there is none."""
    if not shards_loaders(trainer):
        return {}
    return trainer.distributed_sampler_kwargs or {}
