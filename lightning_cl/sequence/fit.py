"""``fit_tasks``: one call trains a module on a sequence of tasks, with one Trainer, one logger and one run folder.

:mod:`lightning_cl.core.loops` prepares Lightning's loops for this. Two more problems are solved here:

* Callbacks would keep scores and averages of the task before. So their state from before the first task is restored
  (:mod:`lightning_cl.sequence.foreign_callbacks`).
* Lightning writes its own checkpoints before a task's end. So a boundary checkpoint is written after it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cl.core.best_weights import best_of
from lightning_cl.core.checkpoint_io import (
    DurableCheckpointIO,
    TorchCheckpointIO,
    find_last_checkpoint,
    read_checkpoint,
    remove_killed_writes,
    resolve_checkpoint,
    run_folder,
)
from lightning_cl.core.checks import check_state, check_trainer, methods_of
from lightning_cl.core.coordinator import CHECKPOINT_KEY, TaskCoordinator
from lightning_cl.core.loops import forget_progress, limit_to_task, restored_limits
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.run_state import Limits, named
from lightning_cl.core.task_files import boundary_file
from lightning_cl.data.module import TaskDataModule
from lightning_cl.lightning_internals import nothing_trained_since, requeued_file
from lightning_cl.random_state import untouched_random_state
from lightning_cl.sequence.evaluate import describe_plan, describe_replay
from lightning_cl.sequence.foreign_callbacks import Pristine, check_foreign, starts_clean
from lightning_cl.sequence.run_files import boundaries_to_keep, drop_checkpoints, only_run_in, set_aside
from lightning_cl.stopping import heed, heeding_signals
from lightning_cl.tasks import Task, TaskPosition


def fit_tasks(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule | dict[str, Any] | list[Any],
    ckpt_path: str | Path | None = None,
    load_best: bool = False,
    keep_checkpoints: str | int = "all",
) -> dict[str, Any]:
    """Trains a module on one task after another.

    The Trainer's ``max_epochs`` and ``max_steps`` are per task. Optimizer and schedule are new for each task.
    EarlyStopping, ModelCheckpoint and all other callbacks of Lightning's start each task with their first state; each
    task has its own folder for checkpoints. After each task, the callbacks first measure and keep what they need
    (importance, buffer). Then the row of the matrix is measured. Last, a boundary checkpoint
    ``tasks/<index>-<name>.ckpt`` is written into the run's folder.

    Args:
        trainer: a Trainer with the continual-learning callbacks. With ``fast_dev_run`` the call is a preflight: it
            prints the plan, trains one batch of every task, and measures nothing.
        module: any LightningModule with automatic optimisation, without changes.
        data: a :class:`~lightning_cl.TaskDataModule`, or the tasks for one: ``{name: DataModule or loader}``.
        ckpt_path: a checkpoint of this sequence to resume from, inside a task or at a boundary. ``"last"`` is the
            newest complete one in the Trainer's ``default_root_dir``. If tasks were added at the end of the list, only
            those are trained.
        load_best: end each task with the weights of its best checkpoint, as the Trainer's ``ModelCheckpoint`` with a
            ``monitor`` finds it. The methods then measure these weights, and the next task starts from them.
        keep_checkpoints: the number of latest tasks whose boundary checkpoints and ``ModelCheckpoint`` files stay:
            ``all``, ``last``, ``none`` or a number. During the run, the disk has only these and those of the present
            task. With ``none``, the last boundary checkpoint is deleted when the run has ended.

    Returns:
        The retention summary of :class:`~lightning_cl.TaskMatrix`; without one, an empty dictionary.

    Raises:
        ValueError, FileNotFoundError, TypeError: for data that cannot be used, before any training.
        MisconfigurationException: for a Trainer, module or checkpoint that does not fit, before any training.
        SIGTERMException, KeyboardInterrupt: if SIGTERM or Ctrl-C has stopped the run; a message says how to resume.
    """
    if not isinstance(data, TaskDataModule):
        data = TaskDataModule(data)
    keep = boundaries_to_keep(keep_checkpoints)
    methods = {name for _, name in named(methods_of(trainer))}
    checkpoint_path = resolve_checkpoint(ckpt_path, trainer.default_root_dir, methods)
    coordinator = _prepare(trainer, module, data, checkpoint_path, load_best)
    try:
        with data.in_sequence(), heeding_signals(), _alone(trainer), restored_limits(trainer) as limits:
            told = _train(trainer, module, data, coordinator, checkpoint_path, limits, keep)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            plan = [] if told else [describe_plan(trainer, data)]
            rank_zero_info("\n".join([*plan, describe_replay(trainer, data)]))
    except (SystemExit, KeyboardInterrupt):  # SIGTERM, and Ctrl-C
        rank_zero_info(_how_to_resume(trainer, coordinator, methods))
        raise
    finally:
        coordinator.end_sequence()
    if "run_report" in vars(module) and hasattr(module, "save_pretrained"):  # what it shows when it is saved
        reports = (getattr(method, "last_report", None) for method in methods_of(trainer))
        setattr(module, "run_report", next((report for report in reports if report is not None), None))  # noqa: B010
    return next((method.summary() for method in methods_of(trainer) if hasattr(method, "summary")), {})


def _train(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule,
    coordinator: TaskCoordinator,
    checkpoint_path: Path | None,
    limits: Limits,
    keep: int | None,
) -> bool:
    """Trains on the tasks one after another; returns True if the plan was printed first."""
    if checkpoint_path is not None:
        _load(trainer, data, coordinator, checkpoint_path)
    elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
        folder = run_folder(trainer)  # on all ranks
        if trainer.is_global_zero:
            set_aside(folder)
    told, coordinator.run.run_limits = _tell_plan_first(trainer, data), limits
    tasks = data.trained_tasks
    start = coordinator.run.position.index if checkpoint_path is not None else 0
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
            coordinator.run.position = position
        rank_zero_info(position.title)
        resume_from = checkpoint_path if index == start else None
        while True:
            coordinator.run.limits, coordinator.lr = limit_to_task(trainer, tasks[index], limits), tasks[index].lr
            _reset_per_task(trainer, coordinator, tasks[index], index)
            coordinator.loads = resume_from is not None
            trainer.fit(module, datamodule=data, ckpt_path=str(resume_from) if resume_from is not None else None)
            heed(trainer, all_ranks=True)
            resume_from = coordinator.went_back(trainer)
            if resume_from is None:
                break
        _check_finished(coordinator, position)
        coordinator.run.costs[-1] |= data.left_out(tasks[index])
        rank_zero_info(f"{position.title}: {coordinator.run.costs[-1]['steps']} steps")
        _boundary(trainer, module, data, trained=index + 1)
        _save_boundary(trainer, coordinator, tasks, index, keep)
        if index + 1 < len(tasks):
            heed(trainer, all_ranks=True)
    if start == len(tasks) and checkpoint_path is not None:
        rank_zero_info(f"All {start} tasks are trained in {checkpoint_path}; new ones go after them in the list")
        _load_weights(trainer, module, data, checkpoint_path)
    for method in methods_of(trainer):
        method.on_sequence_end(trainer, module)
    return told


# ---------------------------------------------------------------------- before the first task


def _prepare(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule,
    checkpoint_path: Path | None,
    load_best: bool,
) -> TaskCoordinator:
    check_trainer(trainer, module)
    check_foreign(trainer)
    _check_settings(trainer, module)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
    if load_best and best_of(trainer) is None:
        raise MisconfigurationException(
            "load_best=True: the Trainer has no ModelCheckpoint that looks for a best one: give"
            " Trainer(callbacks=[ModelCheckpoint(monitor='val_loss')])"
        )
    if checkpoint_path is not None and trainer.is_global_zero:
        remove_killed_writes(checkpoint_path)
    coordinator = TaskCoordinator.of(trainer)
    coordinator.load_best = load_best
    coordinator.begin_sequence(trainer, data, checkpoint_path)
    # This comes before the first evaluation, in which ModelCheckpoint sets its folder.
    _remember_foreign(trainer, coordinator)
    return coordinator


def _check_settings(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuses settings of the Trainer that would silently have another effect in a sequence.

    Raises:
        MisconfigurationException: if there is one; the message says what to do instead.
    """
    overfit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit > 0:
        raise MisconfigurationException(
            f"Trainer(overfit_batches={overfit}): not with a sequence of tasks; use limit_train_batches"
        )
    path = requeued_file(trainer)
    if path is not None:
        raise MisconfigurationException(
            f"{path}: Lightning would resume every task from this file of a requeued job; move it away and give it to"
            " fit_tasks as ckpt_path"
        )
    configured = module.configure_callbacks()
    offered = configured if isinstance(configured, (list, tuple)) else [configured]
    if any(isinstance(callback, ContinualCallback) for callback in offered):
        raise MisconfigurationException(
            f"{type(module).__name__}.configure_callbacks returns a continual-learning callback: Lightning makes a new"
            " one for every task, which has learnt nothing; give it to Trainer(callbacks=[…])"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and "://" in str(callback.dirpath or ""):
            raise MisconfigurationException(
                f"ModelCheckpoint(dirpath={str(callback.dirpath)!r}): a sequence needs a local folder"
            )


def _tell_plan_first(trainer: L.Trainer, data: TaskDataModule) -> bool:
    """Prints the plan of a preflight before a model is built; returns False if that is not possible yet.

    With several processes, Lightning has to start them first. A user's DataModule may need more of the Trainer.
    """
    has_modules = any(isinstance(task.train, L.LightningDataModule) for task in data.tasks)
    if not trainer.fast_dev_run or trainer.world_size > 1 or has_modules:  # type: ignore[attr-defined]
        return False
    data.trainer = trainer
    with untouched_random_state():
        data.prepare_data()
        data.setup("fit")
        rank_zero_info(describe_plan(trainer, data))
    return True


def _load(trainer: L.Trainer, data: TaskDataModule, coordinator: TaskCoordinator, path: Path) -> None:
    """Restores the task index, callbacks and data from a checkpoint.

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
            f" {ours[:reached]}; give the same tasks in the same order, and new ones after them"
        )
    check_state(trainer, state, path)
    data.expected_fingerprint = state["fingerprint"]
    coordinator.load(trainer, state)
    coordinator.run.names = ours


def _load_weights(trainer: L.Trainer, module: L.LightningModule, data: TaskDataModule, path: Path) -> None:
    """Loads a checkpoint's weights into the module when all tasks are trained already."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        if is_overridden("validation_step", module):
            trainer.validate(module, datamodule=data, ckpt_path=str(path), verbose=False)
        else:
            TaskCoordinator.of(trainer).load_weights(trainer, module, read_checkpoint(path))
    finally:
        trainer.loggers = loggers


# ---------------------------------------------------------------------- each task


def _remember_foreign(trainer: L.Trainer, coordinator: TaskCoordinator) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if starts_clean(callback) and id(callback) not in coordinator.pristine:
            coordinator.pristine[id(callback)] = Pristine(callback)


def _reset_per_task(trainer: L.Trainer, coordinator: TaskCoordinator, task: Task, index: int) -> None:
    """Restores the first state of the user's callbacks, and gives ModelCheckpoint a folder for the task."""
    trainer.should_stop = False
    folder = run_folder(trainer)
    _remember_foreign(trainer, coordinator)  # the module's configure_callbacks may have added some
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not starts_clean(callback):
            continue
        coordinator.pristine[id(callback)].restore()
        if isinstance(callback, ModelCheckpoint):
            base = Path(callback.dirpath) if callback.dirpath else folder / "checkpoints"
            callback.dirpath = str(base / f"{index}-{task.slug}")
            # Without this, its first save would come in the middle of an accumulation window.
            nothing_trained_since(callback, trainer.global_step)


def _boundary(
    trainer: L.Trainer, module: L.LightningModule, data: TaskDataModule, trained: int, ckpt_path: str | None = None
) -> None:
    """Lets the methods evaluate and report, without an effect on training."""
    methods = sorted(TaskCoordinator.methods(trainer), key=lambda m: m.boundary_order)
    with TaskCoordinator.of(trainer).evaluating():
        for method in methods:
            method.at_boundary(trainer, module, data, trained, ckpt_path)
            heed(trainer, all_ranks=True)
        for method in methods:
            method.after_boundary(trainer, trained, final=trained == len(data.trained_tasks))


def _check_finished(coordinator: TaskCoordinator, position: TaskPosition) -> None:
    if not coordinator.ended:
        raise RuntimeError(
            f"{position}: the Trainer returned without having trained it (no batches, limit_train_batches=0, or stopped"
            " from outside)"
        )


def _save_boundary(
    trainer: L.Trainer, coordinator: TaskCoordinator, tasks: list[Task], index: int, keep: int | None
) -> None:
    """Writes ``tasks/<index>-<name>.ckpt``, from which the next task can start with a new optimizer."""
    forget_progress(trainer)
    coordinator.reach_boundary(trainer)
    # Trainer(enable_checkpointing=False) and fast_dev_run ask for no files.
    if not trainer.checkpoint_callbacks or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    path = boundary_file(trainer, tasks[index], index)
    trainer.save_checkpoint(path, weights_only=False)
    before_end, coordinator.before_end = coordinator.before_end, None
    if before_end is not None and trainer.is_global_zero:
        before_end.unlink(missing_ok=True)  # the boundary checkpoint has all of its content
    if trainer.is_global_zero:
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        inside = [Path(saver.dirpath).parent for saver in savers if saver.dirpath]
        names = [f"{number}-{task.slug}" for number, task in enumerate(tasks[: index + 1])]
        drop_checkpoints(keep, names, path.parent, inside, final=index + 1 == len(tasks))


def _alone(trainer: L.Trainer) -> Any:
    """A lock on the folder if the run has no logger, and so no folder of its own."""
    if trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return nullcontext()
    folder = run_folder(trainer)  # on all ranks: in a process's second sequence it is agreed on
    return only_run_in(folder) if trainer.is_global_zero else nullcontext()


def _how_to_resume(trainer: L.Trainer, coordinator: TaskCoordinator, methods: set[str]) -> str:
    """Describes the position at which a run was stopped, and how to resume it."""
    try:
        path = find_last_checkpoint(run_folder(trainer), methods)
    except (OSError, ValueError):
        return f"Stopped in {coordinator.position}; nothing was saved to resume from"
    return (
        f"Stopped in {coordinator.position}. To resume: fit_tasks(…, ckpt_path={str(path)!r}), or the same command with"
        f" --ckpt_path {path}"
    )
