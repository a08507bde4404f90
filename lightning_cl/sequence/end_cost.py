"""The cost of a task's end, for the plan of a run."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.tasks import TaskPosition


def describe_end(trainer: L.Trainer, loader: Any, task: TaskPosition, steps: int | None) -> str | None:
    """Describes the methods' work at a task's end, and its duration relative to the training.

    Args:
        trainer: the Trainer with the methods.
        loader: the task's own training loader, with nothing mixed in.
        task: position of the task in the sequence.
        steps: number of optimizer steps that the task is trained for; None if it is not known.

    Returns:
        a text such as ``at its end: 48 Fisher batches, about 4 times its training``; None if there is hardly any work.
    """
    costs = [method.end_cost(trainer, loader, task) for method in TaskCoordinator.methods(trainer)]
    found = [cost for cost in costs if cost is not None]
    if not found:
        return None
    said = "at its end: " + ", ".join(f"{cost.batches} {cost.what} batches" for cost in found)
    trained = _trained_samples(trainer, loader, steps)
    if not trained:
        return said
    times = sum(cost.samples * cost.per_sample for cost in found) * trainer.world_size / trained
    return (
        f"{said}, about {times:.2g} times its training" if times >= 1 else f"{said}, about {times:.0%} of its training"
    )


def _trained_samples(trainer: L.Trainer, loader: Any, steps: int | None) -> float | None:
    """Returns the number of the task's own samples in all its passes; None if it is not known."""
    if steps is None or why_not_plannable(loader) is not None:
        return None
    batches = len(loader)
    return steps * trainer.accumulate_grad_batches * len(task_indices(loader)) / batches if batches else None
