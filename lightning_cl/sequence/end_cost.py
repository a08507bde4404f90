"""The cost of a task's end, for the plan of a run."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.tasks import TaskPosition


def describe_end(trainer: L.Trainer, loader: Any, task: TaskPosition, steps: int | None) -> str | None:
    """Says what the methods do at a task's end, and how long that takes relative to its training.

    Args:
        trainer: with the methods.
        loader: the task's own training loader, nothing mixed into it.
        task: which of how many it is.
        steps: how many optimizer steps it is trained for; None where nobody knows.

    Returns:
        as ``at its end: 48 Fisher batches, about 4 times its training``; None where there is next to nothing to do.
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
    """Returns the samples of its own that a task is trained on, all passes counted; None where nobody knows."""
    if steps is None or why_not_plannable(loader) is not None:
        return None
    batches = len(loader)
    return steps * trainer.accumulate_grad_batches * len(task_indices(loader)) / batches if batches else None
