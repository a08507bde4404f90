"""The held-out sequences of each task that a guard looks at, with their losses then and now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.data.measured_on import content_hash
from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.held_out import held_out_loader
from lightning_cl.passes.sample_losses import sample_losses
from lightning_cl.tasks import Task

_LEAST = 8  # sequences: with fewer, a standard error means nothing


@dataclass
class GuardSet:
    """Sequences of one task; all losses are ``[size]``, in the same order, and None before they are measured.

    Args:
        watched: True for a task that is never trained on.
        data: a hash of the data set that the sequences are from.
        size: their number.
        before: losses before the task's own training.
        reference: losses when the task was learnt; of a watched task, before the first task.
        now: losses after the last task that was trained.
    """

    watched: bool
    data: str | None
    size: int
    before: Tensor | None = None
    reference: Tensor | None = None
    now: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Returns all of it as plain containers and tensors."""
        return dict(vars(self))


@dataclass
class GuardSets:
    """The guard sets of a run, and the passes that measure them.

    Args:
        most: the most sequences of a task.
        seed: seed of their choice.
        names: the tasks to guard; None: all.
        owner: the callback's class, for messages.
    """

    most: int
    seed: int
    names: list[str] | None
    owner: str
    sets: dict[str, GuardSet] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)

    def guarded(self, current: str) -> list[str]:
        """Returns the tasks with a reference, without the one that is trained now."""
        return [name for name, one in self.sets.items() if one.reference is not None and name != current]

    def check_names(self, data: TaskDataModule) -> None:
        """Checks that the tasks to guard exist.

        Raises:
            ValueError: with the names that there are.
        """
        known = [task.name for task in data.tasks]
        unknown = [name for name in self.names or [] if name not in known]
        if unknown:
            raise ValueError(
                f"{self.owner}(tasks={self.names!r}): there is no task {unknown[0]!r}; expected of {known}"
            )

    def begin_task(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, most: int) -> None:
        """A task starts: draws new guard sets, and measures what only the weights of this moment can tell.

        Args:
            trainer: inside a fit.
            pl_module: the module.
            data: the tasks.
            most: the most sequences of a task, less than in a preflight only.
        """
        for task in data.tasks:
            if self.names is not None and task.name not in self.names:
                continue
            loader = self._loader(data, task)  # of later tasks too: what cannot be guarded is said before training
            if loader is None or not (task.watched or task is data.current or task.name in self.sets):
                continue
            known, content = self.sets.get(task.name), content_hash(loader.dataset)
            if known is not None and known.data == content:
                continue
            size = min(most, self.most, len(task_indices(loader)))
            found = self.sets[task.name] = GuardSet(task.watched, content, size)
            losses = self.measure(trainer, pl_module, data, task.name, 0, size)
            if known is not None:
                rank_zero_warn(
                    f"{self.owner}: the validation samples of {task.name} are others than before: from now on it is"
                    " guarded against what it is now, and what it has lost before is not seen"
                )
                found.reference = losses
            elif task.watched:
                found.reference = losses
            if task is data.current:
                found.before, found.reference = losses, None

    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule) -> None:
        """A task ends: its losses become the reference, and all are measured once more."""
        for name, one in self.sets.items():
            one.now = self.measure(trainer, pl_module, data, name, 0, one.size)
            if one.reference is None and name == data.current.name:
                one.reference = one.now.clone()

    def measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, name: str, first: int, end: int
    ) -> Tensor:
        """Returns the losses of a task's sequences from number `first` to `end`, the same on all ranks."""
        task = next(task for task in data.tasks if task.name == name)
        with data.showing(task):
            loader = held_out_loader(data, task)
            return sample_losses(trainer, pl_module, loader, first=first, end=end, seed=self.seed)

    def tokens(self, data: TaskDataModule, name: str) -> float:
        """Returns the mean length of a task's sequences; 1 where lengths are not known."""
        task = next(task for task in data.tasks if task.name == name)
        return mean_length(held_out_loader(data, task))

    def _loader(self, data: TaskDataModule, task: Task) -> Any:
        """Returns a task's validation loader; None, and a warning once, where it cannot be guarded."""
        loader = held_out_loader(data, task)
        reason = None
        if loader is None:
            reason = "it has no validation data"
        elif why_not_plannable(loader) is not None:
            reason = f"its validation samples have no index ({why_not_plannable(loader)})"
        elif len(task_indices(loader)) < _LEAST:
            reason = f"it has {len(task_indices(loader))} validation samples, fewer than {_LEAST}"
        told = task.name in self._left_out
        if reason is not None and self.names is not None:
            raise ValueError(f"{self.owner}(tasks={self.names!r}): {task.name} cannot be guarded: {reason}")
        if reason is not None and not told:
            rank_zero_warn(f"{self.owner}: {task.name} is not guarded: {reason}")
        elif reason is None and not told and data.validated_on_training_data(task):
            rank_zero_warn(
                f"{self.owner}: {task.name} has no validation data of its own: the guard looks at samples that are"
                " trained on, and forgetting shows there later, if they are replayed not at all"
            )
        self._left_out.add(task.name)
        return loader if reason is None else None

    def state(self) -> dict[str, Any]:
        """Returns the sets as plain containers and tensors."""
        return {name: one.state() for name, one in self.sets.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.sets = {name: GuardSet(**one) for name, one in state.items()}


def mean_length(loader: Any) -> float:
    """Returns the mean number of tokens of some of a loader's samples; 1 where lengths are not known."""
    length_of = getattr(getattr(loader, "dataset", None), "length", None)
    size = len(loader.dataset) if length_of is not None else 0
    if length_of is None or size == 0:
        return 1.0
    picked = torch.linspace(0, size - 1, min(size, 256)).long().tolist()
    mean: float = sum(length_of(index) for index in picked) / len(picked)
    return max(mean, 1.0)
