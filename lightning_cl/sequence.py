"""``fit_tasks``: one call takes a module through a sequence of tasks, with one Trainer, one logger and one run folder.

This is the only file that touches the internals of Lightning's loops. What it works around, all measured on 2.6.6:

* A repeated ``fit`` trains nothing, without an error: the epochs of the last fit count. So they are reset.
* ``max_steps`` counts the steps of all fits. So it is raised for each task, after optimizers and schedules were made.
* EarlyStopping and ModelCheckpoint carry scores over. So they are put back to what they were before the first task.
* Lightning's own checkpoints are written before a task's end. So a boundary checkpoint is written after it.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_cl.callbacks.coordinator import CHECKPOINT_KEY, TaskCoordinator, check_state, check_trainer
from lightning_cl.checkpoint_io import DurableCheckpointIO, TorchCheckpointIO, find_last_checkpoint, read_checkpoint
from lightning_cl.data.loader import TaskLoader, why_not_plannable
from lightning_cl.data.module import TaskDataModule
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import Task, TaskPosition


def fit_tasks(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule | dict[str, Any] | list[Any],
    ckpt_path: str | Path | None = None,
) -> dict[str, Any]:
    """Trains a module on one task after another.

    The Trainer's ``max_epochs`` and ``max_steps`` are per task. Optimizer and schedule are fresh for each task;
    EarlyStopping and ModelCheckpoint work per task, checkpoints in a folder for each. After each task come, in this
    order: what the callbacks measure and keep (importance, buffer), the row of the matrix, and a boundary checkpoint
    ``tasks/<index>-<name>.ckpt`` in the run's folder.

    Args:
        trainer: with the continual-learning callbacks. ``fast_dev_run`` is a preflight: one batch of every task, and
            the plan in words.
        module: any LightningModule with automatic optimisation, unedited.
        data: a :class:`~lightning_cl.TaskDataModule`, or what it takes as tasks: ``{name: DataModule or loader}``.
        ckpt_path: a checkpoint of this sequence to go on from, inside a task or at a boundary, or ``"last"`` for the
            newest whole one in the Trainer's ``default_root_dir``. Tasks may have been added at the end of the list:
            then only those are trained.

    Returns:
        The retention summary of :class:`~lightning_cl.TaskMatrix`; without one, an empty dictionary.

    Raises:
        ValueError, FileNotFoundError, TypeError: for data that cannot be used, before any training.
        MisconfigurationException: for a Trainer, module or checkpoint that does not fit, before any training.
    """
    if not isinstance(data, TaskDataModule):
        data = TaskDataModule(data)
    checkpoint_path = _resolve(ckpt_path, trainer)
    coordinator = _prepare(trainer, module, data, resumed=checkpoint_path is not None)
    if checkpoint_path is not None:
        _load(trainer, data, coordinator, checkpoint_path)
    tasks = data.trained_tasks
    start = coordinator.position.index if checkpoint_path is not None else 0
    if checkpoint_path is None or not coordinator.started:
        weights = str(checkpoint_path) if checkpoint_path is not None else None
        data.index = min(start, len(tasks) - 1)
        _boundary(trainer, module, data, trained=start, ckpt_path=weights)
    for index in range(start, len(tasks)):
        position = TaskPosition(index, tasks[index].name, len(tasks))
        data.index = index
        if not coordinator.started or index > start:
            coordinator.begin_task(position)
        else:
            coordinator.position = position
        _limit(trainer, coordinator, tasks[index])
        _reset_per_task(trainer, tasks[index], index)
        rank_zero_info(f"{str(position).capitalize()}")
        resume_from = str(checkpoint_path) if checkpoint_path is not None and index == start else None
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
        _check_finished(trainer, coordinator, position)
        _boundary(trainer, module, data, trained=index + 1)
        _save_boundary(trainer, coordinator, tasks[index], index)
    if start == len(tasks) and checkpoint_path is not None:
        _load_weights(trainer, module, data, checkpoint_path)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info(describe_plan(trainer, data, coordinator.costs))
    methods = TaskCoordinator.methods(trainer)
    return next((method.summary() for method in methods if hasattr(method, "summary")), {})


def evaluate_tasks(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule,
    stage: Literal["validate", "test"] = "validate",
    ckpt_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a module on each task by itself.

    Args:
        trainer: any Trainer.
        module: the module.
        data: the tasks; for ``test``, those that have test data.
        stage: ``validate`` or ``test``.
        ckpt_path: where to load the weights from; ``"last"`` for the newest whole checkpoint.

    Returns:
        for each task the logged metrics.

    Raises:
        ValueError: if no task has test data.
    """
    data.driven = True
    weights = _resolve(ckpt_path, trainer)
    results = {}
    for column, task in enumerate(data.tasks):
        if stage == "test" and task.test is None and not isinstance(task.train, L.LightningDataModule):
            continue
        data.watch = column
        run = trainer.validate if stage == "validate" else trainer.test
        run(module, datamodule=data, ckpt_path=str(weights) if weights is not None else None, verbose=False)
        weights = None  # the module has them now
        results[task.name] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    data.watch = None
    if not results:
        raise ValueError("no task has test data: give Task(test=…)")
    names = sorted({name for metrics in results.values() for name in metrics})
    width = max(len(task) for task in results)
    rows = [" " * width + "".join(f"  {name:>20}" for name in names)]
    rows += [
        f"{task:<{width}}" + "".join(f"  {metrics.get(name, math.nan):>20.4f}" for name in names)
        for task, metrics in results.items()
    ]
    rank_zero_info("\n".join(["", *rows, ""]))
    return results


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's files go: the logger's folder, or the Trainer's ``default_root_dir`` (called on all ranks)."""
    return Path(trainer.log_dir or trainer.default_root_dir)


# ---------------------------------------------------------------------- before the first task


def _prepare(trainer: L.Trainer, module: L.LightningModule, data: TaskDataModule, resumed: bool) -> TaskCoordinator:
    check_trainer(trainer, module)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
    coordinator = TaskCoordinator.of(trainer)
    coordinator.begin_sequence(trainer, data, resumed)
    data.driven = True
    coordinator.pristine = coordinator.pristine or _snapshot(trainer)
    return coordinator


def _resolve(ckpt_path: str | Path | None, trainer: L.Trainer) -> Path | None:
    if ckpt_path is None:
        return None
    return find_last_checkpoint(trainer.default_root_dir) if str(ckpt_path) == "last" else Path(ckpt_path)


def _load(trainer: L.Trainer, data: TaskDataModule, coordinator: TaskCoordinator, path: Path) -> None:
    """Brings index, callbacks and data to where the checkpoint was written.

    Raises:
        MisconfigurationException: if its tasks, callbacks or vocabulary are not those of the run.
    """
    state = read_checkpoint(path).get(CHECKPOINT_KEY)
    if state is None or not state["driven"]:
        raise MisconfigurationException(
            f"ckpt_path={str(path)!r}: it was not written by fit_tasks: it does not say which task it belongs to. Load"
            " its weights into the module and start without ckpt_path"
        )
    ours, theirs = [task.name for task in data.trained_tasks], list(state["tasks"])
    reached = state["index"] + (1 if state["started"] else 0)
    if theirs[:reached] != ours[:reached]:
        raise MisconfigurationException(
            f"ckpt_path={str(path)!r}: it has been trained on the tasks {theirs[:reached]}, this run begins with"
            f" {ours[:reached]}; give the same tasks in the same order, and new ones behind them"
        )
    check_state(trainer, state)
    data.expected_fingerprint = state["fingerprint"]
    coordinator.load(trainer, state)
    coordinator.names = ours


def _load_weights(trainer: L.Trainer, module: L.LightningModule, data: TaskDataModule, path: Path) -> None:
    """Nothing is left to train: the module still gets what the checkpoint's training ended with."""
    data.driven, loggers, trainer.loggers = True, trainer.loggers, []
    try:
        if is_overridden("validation_step", module):
            trainer.validate(module, datamodule=data, ckpt_path=str(path), verbose=False)
        else:
            module.configure_model()
            module.load_state_dict(read_checkpoint(path)["state_dict"])
    finally:
        trainer.loggers = loggers


# ---------------------------------------------------------------------- each task


def _limit(trainer: L.Trainer, coordinator: TaskCoordinator, task: Task) -> None:
    """Makes ``max_epochs`` and ``max_steps`` those of this task."""
    epochs, steps = coordinator.trainer_limits or (trainer.max_epochs, trainer.max_steps)
    coordinator.trainer_limits = (epochs, steps)
    if task.max_epochs is not None or task.max_steps is not None:
        epochs, steps = task.max_epochs if task.max_epochs is not None else -1, task.max_steps or -1
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        epochs, steps = coordinator.trainer_limits
    if steps == -1 and (epochs is None or epochs == -1):
        raise MisconfigurationException(
            f"task {task.name!r} would never end: set Trainer(max_epochs=…) or max_steps, or the task's own"
        )
    loop = trainer.fit_loop
    loop.epoch_progress.current.reset()
    loop.epoch_loop.batch_progress.current.reset()
    loop.epoch_loop.batch_progress.is_last_batch = False
    loop.max_epochs = epochs if epochs is not None else -1
    loop.epoch_loop.max_steps = steps
    coordinator.max_steps = steps if steps != -1 else None
    coordinator.lr = task.lr


def _snapshot(trainer: L.Trainer) -> dict[int, dict[str, Any]]:
    """EarlyStopping and ModelCheckpoint as the user made them."""
    return {
        index: copy.deepcopy({key: value for key, value in vars(callback).items() if key not in ("log", "log_dict")})
        for index, callback in enumerate(trainer.callbacks)  # type: ignore[attr-defined]
        if _has_scores(callback)
    }


def _has_scores(callback: Callback) -> bool:
    return isinstance(callback, (EarlyStopping, ModelCheckpoint))


def _reset_per_task(trainer: L.Trainer, task: Task, index: int) -> None:
    """The user's own EarlyStopping and ModelCheckpoint objects, as before the first task, with a folder per task."""
    coordinator = TaskCoordinator.of(trainer)
    trainer.should_stop = False
    folder = run_folder(trainer)
    scored = [callback for callback in trainer.callbacks if _has_scores(callback)]  # type: ignore[attr-defined]
    for callback, values in zip(scored, coordinator.pristine.values(), strict=True):
        vars(callback).update(copy.deepcopy(values))
        if isinstance(callback, ModelCheckpoint):
            base = Path(callback.dirpath) if callback.dirpath else folder / "checkpoints"
            callback.dirpath = str(base / f"{index}-{task.slug}")
            # "Nothing has been trained since": else its first save falls into the middle of an accumulation window.
            callback._last_global_step_saved = trainer.global_step


def _boundary(
    trainer: L.Trainer, module: L.LightningModule, data: TaskDataModule, trained: int, ckpt_path: str | None = None
) -> None:
    """Lets the methods evaluate and report; training does not notice."""
    methods = TaskCoordinator.methods(trainer)
    with untouched_random_state():
        for method in sorted(methods, key=lambda m: m.boundary_order):
            method.at_boundary(trainer, module, data, trained, ckpt_path)
        for method in methods:
            method.after_boundary(trainer, trained, final=trained == len(data.trained_tasks))


def _check_finished(trainer: L.Trainer, coordinator: TaskCoordinator, position: TaskPosition) -> None:
    if not coordinator.ended:
        raise RuntimeError(
            f"{position}: the Trainer returned without having trained it (no batches, limit_train_batches=0, or stopped"
            " from outside)"
        )


def _save_boundary(trainer: L.Trainer, coordinator: TaskCoordinator, task: Task, index: int) -> None:
    """Writes ``tasks/<index>-<name>.ckpt``: the next task starts from here, with a fresh optimizer."""
    loop = trainer.fit_loop
    loop.epoch_progress.reset()
    loop.epoch_loop.batch_progress.reset()
    loop.epoch_loop.scheduler_progress.reset()
    loop.epoch_loop.val_loop.batch_progress.reset()
    coordinator.reach_boundary(trainer)
    folder = run_folder(trainer)
    # Trainer(enable_checkpointing=False) and fast_dev_run ask for no files.
    if trainer.checkpoint_callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.save_checkpoint(folder / "tasks" / f"{index}-{task.slug}.ckpt", weights_only=False)


# ---------------------------------------------------------------------- with and without the driver


class _MixingSource(_DataLoaderSource):
    """Where the Trainer gets its training loader from, with what the methods mix into it."""

    def __init__(self, source: _DataLoaderSource, trainer: L.Trainer) -> None:
        super().__init__(source.instance, source.name)
        self._trainer = trainer

    @override
    def dataloader(self) -> Any:
        loader = super().dataloader()
        if not TaskCoordinator.of(self._trainer).driven:
            with untouched_random_state():
                for method in TaskCoordinator.methods(self._trainer):
                    method.check_loader(loader, "of trainer.fit")
        methods = [method for method in TaskCoordinator.methods(self._trainer) if method.mixes]
        if not methods:
            return loader
        if not isinstance(loader, TaskLoader):
            ranks = self._trainer.distributed_sampler_kwargs or {}
            loader = TaskLoader.from_dataloader(
                loader,
                rank=ranks.get("rank", 0),
                world_size=ranks.get("num_replicas", 1),
                broadcast=self._trainer.strategy.broadcast,
            )
        for method in methods:
            method.mix_into(self._trainer, loader)
        return loader


def let_methods_mix(trainer: L.Trainer) -> None:
    """Lets the methods add to the training loader when Lightning asks for it."""
    source = trainer.fit_loop._data_source
    if not isinstance(source, _MixingSource):
        trainer.fit_loop._data_source = _MixingSource(source, trainer)


def describe_plan(trainer: L.Trainer, data: TaskDataModule, costs: list[dict[str, float]]) -> str:
    """What a full run would do, in words: the result of a preflight."""
    lines = ["Preflight: one batch of every task went through. The full run:"]
    for index, task in enumerate(data.trained_tasks):
        loader = data.train_loader(task)
        size = f"{len(loader)} batches an epoch" if hasattr(loader, "__len__") else "a stream of unknown length"
        limits = [f"{key}={value}" for key, value in vars(task).items() if key.startswith("max_") and value is not None]
        lines.append(f"  {index + 1}. {task.name}: {size}{''.join(', ' + limit for limit in limits)}")
        lines += [f"     {line}" for line in data.describe(task)]
        mixing = [method for method in TaskCoordinator.methods(trainer) if method.mixes]
        if isinstance(loader, TaskLoader) and index > 0 and mixing:
            for method in mixing:
                method.mix_into(trainer, loader)
            lines.append(f"     with replay: {len(loader)} batches an epoch")
    return "\n".join(lines)


def steps_of_task(trainer: L.Trainer) -> int | None:
    """How many optimizer steps the coming fit takes, for schedules; None if nobody can know.

    For use in ``configure_optimizers``. Unlike ``trainer.estimated_stepping_batches`` it does not set the data up,
    which would lose the loader's place on a resume.
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
        if batches is not None and why_not_plannable(loader) is None and trainer.distributed_sampler_kwargs:
            batches = math.ceil(batches / trainer.distributed_sampler_kwargs["num_replicas"])  # Lightning will shard it
        if batches is not None:
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    known = [count for count in (by_epochs, steps if steps > 0 else None) if count is not None]
    return min(known) if known else None
