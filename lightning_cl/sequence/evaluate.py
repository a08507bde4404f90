"""Evaluation outside of a sequence, task by task, and the description of a run's plan."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_cl.core.checkpoint_io import resolve_checkpoint
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.core.loops import planned_steps
from lightning_cl.data.batch_source import is_indexed
from lightning_cl.data.exercises import exercises_of
from lightning_cl.data.module import TaskDataModule
from lightning_cl.data.preview import LEGEND, sample_lines, wants_colour
from lightning_cl.passes.exam import hold_exam, new_tokens
from lightning_cl.sequence.end_cost import describe_end
from lightning_cl.tasks import TaskPosition


def evaluate_tasks(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule,
    stage: Literal["validate", "test"] = "validate",
    ckpt_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a module on each task by itself: what it logs, and the task's ``metrics`` on all samples.

    Args:
        trainer: any Trainer.
        module: the module.
        data: the tasks; for ``test``, those that have test data.
        stage: ``validate`` or ``test``.
        ckpt_path: the checkpoint to load the weights from; ``"last"`` for the newest complete one.

    Returns:
        the logged metrics and the task's own metrics, by task.

    Raises:
        ValueError: if no task has test data.
    """
    weights = resolve_checkpoint(ckpt_path, trainer.default_root_dir)
    results = {}
    for task in data.tasks:
        if stage == "test" and not data.has_test_data(task):
            continue
        run = trainer.validate if stage == "validate" else trainer.test
        with data.showing(task):
            run(module, datamodule=data, ckpt_path=str(weights) if weights is not None else None, verbose=False)
        weights = None  # the module has them now
        results[task.name] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if task.metrics:
            exercises = exercises_of(data, task, "val" if stage == "validate" else "test")
            if not exercises:
                raise ValueError(
                    f"task {task.name!r}, metrics={task.metrics}: there is no prompt with an answer in its {stage} data"
                )
            exam = hold_exam(trainer, module, data, task, exercises, new_tokens(task, exercises))
            results[task.name] |= {name: statistics.fmean(scores) for name, scores in exam.scores.items()}
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


def describe_plan(trainer: L.Trainer, data: TaskDataModule) -> str:
    """Describes the plan of a full run, with one sample of each task; a preflight begins with it."""
    lines = ["Preflight: one batch of every task goes through. The full run:"]
    if any(data.text_data(task) for task in data.trained_tasks):
        lines.append(f"  {LEGEND}")
    for index, task in enumerate(data.trained_tasks):
        loader = data.train_loader(task)
        batches = _batches(loader)
        size = f"{batches} batches an epoch" if batches is not None else "a stream of unknown length"
        steps = planned_steps(trainer, task, batches)
        said = [size, *([f"{steps} steps"] if steps is not None else [])]
        said += [f"{key}={value}" for key, value in vars(task).items() if key.startswith("max_") and value is not None]
        end = describe_end(trainer, loader, TaskPosition(index, task.name, len(data.trained_tasks)), steps)
        notes = [*data.describe(task), *([end] if end is not None else [])]
        if data.text_data(task):
            notes += sample_lines(data, task, wants_colour(sys.stderr))
        lines += [f"  {index + 1}. {task.name}: {', '.join(said)}", *(f"     {note}" for note in notes)]
    return "\n".join(lines)


def describe_replay(trainer: L.Trainer, data: TaskDataModule) -> str:
    """Describes the plan with replay, which needs samples in the buffers; a preflight ends with it."""
    lines = ["One batch of every task went through."]
    mixing = [method for method in TaskCoordinator.methods(trainer) if method.mixes]
    for index, task in enumerate(data.trained_tasks):
        # The first task has no earlier tasks, but general data and the model's own texts can be replayed.
        present = [method for method in mixing if index > 0 or method.replays_first]
        loader = data.train_loader(task)
        if is_indexed(loader) and present:
            for method in present:
                method.mix_into(trainer, loader)
            steps = planned_steps(trainer, task, len(loader))
            said = f", {steps} steps" if steps is not None else ""
            lines.append(f"  {index + 1}. {task.name} with replay: {len(loader)} batches an epoch{said}")
    return "\n".join(lines)


def _batches(loader: Any) -> int | None:
    return len(loader) if hasattr(loader, "__len__") else None
