"""The files that a sequence writes between tasks: ``tasks/<index>-<name>.ckpt`` in the run's folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.tasks import Task

BEFORE_END = ".trained.ckpt"
"""The ending of a checkpoint that holds a task's training, and not yet what its methods measure at its end."""


def boundary_file(trainer: L.Trainer, task: Task, index: int) -> Path:
    """Returns where the checkpoint after a task goes (to be called on all ranks)."""
    return run_folder(trainer) / "tasks" / f"{index}-{task.slug}.ckpt"


def before_end_file(trainer: L.Trainer, task: Task, index: int) -> Path:
    """Returns where the checkpoint before a task's end goes (to be called on all ranks)."""
    return boundary_file(trainer, task, index).with_suffix(BEFORE_END)
