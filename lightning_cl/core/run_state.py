"""State of a run that methods read: its position, limits, data and costs, and the methods that take part in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cl.data import TaskDataModule
from lightning_cl.data.mixing.contents import Kinds
from lightning_cl.tasks import Task, TaskPosition


@dataclass
class Limits:
    """Bounds of a fit, in epochs and steps of its own."""

    max_epochs: int | None
    max_steps: int
    min_steps: int | None
    accumulated: int = 1
    """Batches of an optimizer step; a ``GradientAccumulationScheduler`` changes it while a task is trained."""

    def of_task(self, task: Task) -> tuple[int | None, int]:
        """Returns the epochs and steps of a task: one that sets a limit has no other."""
        if task.max_epochs is None and task.max_steps is None:
            return self.max_epochs, self.max_steps
        return task.max_epochs if task.max_epochs is not None else -1, task.max_steps or -1


@dataclass
class RunState:
    """State of a run, which every callback with an attribute ``run`` of this class gets handed.

    The coordinator writes it, and methods read it as ``self.run``. It holds nothing of Lightning, so that a method
    asks the Trainer for as little as possible. A method that takes part in no run yet has an empty one.
    """

    position: TaskPosition = field(default_factory=lambda: TaskPosition(0, "task", 1))
    names: list[str] = field(default_factory=list)
    """The tasks that are trained in a sequence, in their order."""
    driven: bool = False
    """True under ``fit_tasks``; else each ``trainer.fit`` is one task."""
    first_step: int = 0
    """``trainer.global_step`` when the current task started."""
    limits: Limits | None = None
    """Bounds of the current task."""
    run_limits: Limits | None = None
    """The Trainer's own bounds, from which those of a task can differ."""
    data: TaskDataModule | None = None
    """The sequence's data; None without ``fit_tasks``."""
    checkpoint_path: Path | None = None
    """The file that a sequence resumes from."""
    kinds: Kinds | None = None
    """The replayed parts of the current batch; None where nothing is replayed."""
    methods: list[Any] = field(default_factory=list)
    """The continual-learning callbacks of the Trainer, in its order."""
    applied: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the importances that several proximal penalties have applied in this step, by parameter."""
    costs: list[dict[str, float]] = field(default_factory=list)
    """Steps, seconds and sample counts of each task that has ended."""
    loading: bool = False
    """True while parts are built for a checkpoint's weights that are about to be loaded: the module is to have no
    others."""
    begin_seconds: float = 0.0
    """Seconds that methods have spent for the current task before its training."""

    def name_of(self, method: Any) -> str:
        """Returns a method's name in its Trainer: its class, and a number from the second of a class on."""
        return next(name for other, name in named(self.methods) if other is method)


def named(methods: list[Any]) -> list[tuple[Any, str]]:
    """Pairs each method with a name that is unique in its Trainer: the class, and a number from the second on."""
    seen: dict[str, int] = {}
    result = []
    for method in methods:
        name = type(method).__name__
        seen[name] = seen.get(name, 0) + 1
        result.append((method, name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return result
