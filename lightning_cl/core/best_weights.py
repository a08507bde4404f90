"""The weights of a task's best checkpoint, with which the task ends where the user asks for it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.core.checkpoint_io import read_checkpoint
from lightning_cl.core.loops import load_weights
from lightning_cl.tasks import TaskPosition


def best_of(trainer: L.Trainer) -> ModelCheckpoint | None:
    """Returns the first ModelCheckpoint that looks for a best score."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((saver for saver in savers if saver.monitor is not None), None)


def load_best(trainer: L.Trainer, position: TaskPosition) -> None:
    """Replaces the last weights by those of the task's best checkpoint; warns where there is none."""
    saver = best_of(trainer)
    path = saver.best_model_path if saver is not None else ""
    if not path or not Path(path).is_file():
        rank_zero_warn(f"load_best: no checkpoint of {position} has a best score; it ends with its last weights")
        return
    load_weights(trainer, read_checkpoint(path))
