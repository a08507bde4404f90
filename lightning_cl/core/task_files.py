"""Files that a sequence writes between tasks: ``tasks/<index>-<name>.ckpt`` in the run's folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.tasks import Task

BEFORE_END = ".trained.ckpt"
"""Ending of a checkpoint after a task's training and before its methods' measurements."""


def safe_file(trainer: L.Trainer, task: Task, index: int) -> Path:
    """Returns the path of the checkpoint inside a task to which a run can go back; call it on all ranks."""
    return run_folder(trainer) / "guard" / f"{index}-{task.slug}.ckpt"


def boundary_file(trainer: L.Trainer, task: Task, index: int) -> Path:
    """Returns the path of the checkpoint after a task; call it on all ranks."""
    return run_folder(trainer) / "tasks" / f"{index}-{task.slug}.ckpt"


def before_end_file(trainer: L.Trainer, task: Task, index: int) -> Path:
    """Returns the path of the checkpoint before a task's end; call it on all ranks."""
    return boundary_file(trainer, task, index).with_suffix(BEFORE_END)
