"""The steps at which a guard looks: counted in work and not in seconds, so that a resumed run looks at the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L

from lightning_cl.callbacks.monitoring.guard_sets import mean_length

SHARE = 0.02
"""The part of a task's training work that looks may take."""

_FORWARD = 1 / 3  # a forward pass, in training passes
_LOOKS = 4  # looks at a task, as far as SHARE allows
_LEAST = 16  # sequences of a look, as far as there are so many


@dataclass
class Schedule:
    """The next look of a task, and what looks may cost.

    A step's work is its tokens (its samples, where lengths are not known); a sequence that is looked at takes a third
    of the work of training on it.

    Args:
        step_work: of an optimizer step on one rank.
        steps: the task's optimizer steps; None if nobody knows.
        look_work: of one sequence of each guarded task, on one rank.
        samples: sequences of a task at a look.
        every: steps between looks; None: as the work allows.
    """

    step_work: float
    steps: int | None
    look_work: float
    samples: int
    every: int | None
    next: int = 0
    spent: float = 0.0

    @classmethod
    def of_task(
        cls, trainer: L.Trainer, steps: int | None, lengths: list[float], samples: int, every: int | None, grace: int
    ) -> Schedule:
        """Plans the looks at a task that starts.

        Args:
            trainer: inside its fit.
            steps: its optimizer steps; None if nobody knows.
            lengths: mean length of each guarded task's sequences.
            samples: the sequences that a look should have.
            every: steps between looks; None: as the work allows, with fewer sequences where a task is short.
            grace: steps before the first look.
        """
        loader: Any = trainer.train_dataloader
        rows = getattr(loader, "batch_size", None)
        length = getattr(loader, "block_length", None) or mean_length(loader)
        step_work = (rows if isinstance(rows, int) else 1) * length * trainer.accumulate_grad_batches
        look_work = _FORWARD * sum(lengths) / trainer.world_size
        if every is None and steps is not None and look_work > 0:
            samples = min(samples, max(_LEAST, int(SHARE * steps * step_work / look_work / _LOOKS)))
        made = cls(step_work, steps, look_work, samples, every)
        made.next = max(grace, made._distance(samples * look_work))
        return made

    def _distance(self, work: float) -> int:
        return self.every if self.every is not None else max(1, math.ceil(work / (SHARE * self.step_work)))

    def may_look_longer(self, work: float) -> bool:
        """Tells if a look may take so much more work, since the answer is not clear yet."""
        if self.every is not None or self.steps is None:
            return True
        return self.spent + work <= SHARE * self.steps * self.step_work

    def looked(self, step: int, work: float) -> None:
        """A look at a step has taken so much work: sets the next one."""
        self.spent += work
        self.next = step + self._distance(work)

    def too_few(self) -> bool:
        """True if the task ends before the first look."""
        return self.steps is not None and self.next > self.steps

    def state(self) -> dict[str, Any]:
        """Returns all of it as numbers."""
        return dict(vars(self))
