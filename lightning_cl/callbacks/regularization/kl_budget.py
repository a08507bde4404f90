"""``strength=KLBudget(0.05)``: the strength follows the divergence of the model's predictions to a stated value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer, check_positive, is_integer
from lightning_cl.callbacks.regularization.chosen_strength import FIRST_CHOICE, ChosenStrength
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.loops import steps_of_current_task
from lightning_cl.core.placement import tensor_bytes
from lightning_cl.core.questions import Need
from lightning_cl.core.run_state import RunState
from lightning_cl.functional.kl_budget import controlled_strength
from lightning_cl.passes.divergence import Divergence
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.passes import leaving_no_trace
from lightning_cl.passes.starting_weights import StartingWeights
from lightning_cl.passes.task_samples import TaskSamples

_UPDATES = 50  # of a task, with `auto`
_EVERY = 10  # steps, where nobody knows how many a task has
_PULL = 2.0  # times the task's largest pull: a penalty gets no more, or the gradient step becomes unstable
_UNUSED = 0.8  # a share of the budget below which the report says that it was not used up


class KLBudget:
    """A budget that sets the strength of a penalty or of ``LwF``: the nats that the model's predictions may move by.

    The budget is ``KL(reference ‖ now)``, the mean over tokens that bear loss (for a classifier, over samples) of the
    data of the task that is trained. It predicts forgetting (RL's Razor, arXiv:2509.04259), and it has the same meaning
    for all models, methods and optimizers. In each task the strength starts near the value at which penalty and task
    would hold each other at the budget. Then it is controlled
    (:func:`~lightning_cl.functional.kl_budget.controlled_strength`). The report has the divergence that was reached. A
    model that does not move so far by itself stays below its budget.

    The divergence is measured on the same few training samples each time, in evaluation mode. A learning rate that
    ends near 0 leaves the controller nothing to control, so what matters are the steps before.

    Memory: a copy of the trainable parameters on the CPU and in checkpoints, and once more on the device during a
    measurement (none under LoRA with ``of="base"``). Compute: two forward passes over `samples` samples each time.
    With ``every="auto"`` a task has 50 measurements. At batches of as many samples that is 2 % of the time of a task
    of 2,000 steps, and 17 % of one of 200.

    Args:
        kl: the budget in nats, above 0; 0.01 to 0.1 for a language model that is to keep most of what it knew.
        of: ``previous``: the reference is the model before the task. ``base``: the model before the first task.
        every: ``auto``, or the number of steps from one measurement to the next.
        samples: number of the task's training samples to measure on.
        seed: seed for the choice of samples.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``, and the method has no such argument itself.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from lightning_cl import EWC, KLBudget
        >>> EWC(strength=KLBudget(0.05)).report()["strength"]
        'KLBudget(0.05)'
    """

    def __init__(
        self,
        kl: float,
        of: Literal["previous", "base"] = "previous",
        every: int | Literal["auto"] = "auto",
        samples: int = 16,
        seed: int = 0,
        outputs: OutputsFunction | None = None,
    ) -> None:
        self.kl = check_positive("kl", kl, "a positive, finite number of nats, as 0.05")
        self.of = check_choice("of", of, ("previous", "base"))
        if every != "auto" and not is_integer(every, 1):
            raise ValueError(f"every={every!r}: expected a positive number of steps, or 'auto'")
        self.every = every
        self.samples = check_integer("samples", samples, 1)
        self.seed = check_integer("seed", seed)
        self.outputs = outputs

    @override
    def __repr__(self) -> str:
        return f"KLBudget({self.kl:g})" if self.of == "previous" else f"KLBudget({self.kl:g}, of={self.of!r})"


class KLStrength(ChosenStrength):
    """The strength of one method that has a :class:`KLBudget`.

    Args:
        budget: the budget.
        owner: the method's class, for messages.
        outputs: the method's own function for logits, or None.
        value: the strength before the first choice.

    Attributes:
        value: the present strength.
        largest: the task's largest pull at any choice in the present task.
        chosen: all choices, each with its ``task``, ``step`` in the task, ``kl`` and ``strength``.
        reached: task name to the divergence at its end.
    """

    def __init__(
        self, budget: KLBudget, owner: str, outputs: OutputsFunction | None = None, value: float = 0.0
    ) -> None:
        super().__init__(value)
        self.budget, self.owner = budget, owner
        self.outputs = budget.outputs or outputs
        self.reached: dict[str, float] = {}
        self._next, self._every = FIRST_CHOICE, _EVERY
        self._kl: float | None = None  # the last measured one
        self._before: float | None = None  # that of the choice before, in this task
        self._begun: int | None = None  # the task that the reference belongs to
        self._reference: StartingWeights | None = None
        self._batches: list[Any] | None = None

    @override
    def set_up(self, trainer: L.Trainer, outputs: OutputsFunction | None) -> None:
        refuse_sharded(trainer, f"{self.owner}(strength=KLBudget(…)): a reference cannot be swapped in for")
        self.outputs = self.budget.outputs or outputs

    @override
    def begin_task(self) -> None:
        """Starts a task: the divergence starts anew."""
        self._next, self.largest, self._kl, self._before = FIRST_CHOICE, 0.0, None, None

    @override
    def begin_sequence(self) -> None:
        """A new sequence starts, with its own base."""
        self._reference, self._begun = None, None

    @override
    def keep_reference(self, pl_module: L.LightningModule, task: int, needed: bool) -> None:
        """Keeps the weights that a task starts with.

        Args:
            pl_module: the module, with these weights.
            task: number of the task.
            needed: False if the method has nothing to hold in this task.
        """
        if self._begun == task:
            return
        self._begun = task
        if self.budget.of == "base":
            self._reference = self._reference or StartingWeights(pl_module)
            self._reference.add_trainable(pl_module)
        else:
            self._reference = StartingWeights(pl_module) if needed else None

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule, run: RunState) -> None:
        """Training starts or resumes: chooses the samples, and checks that they have logits."""
        self._batches = None
        if self._reference is None:
            return
        self._reference.find_in(pl_module)
        steps = steps_of_current_task(trainer, run.limits)
        if isinstance(self.budget.every, int):
            self._every = self.budget.every
        else:
            self._every = max(1, steps // _UPDATES) if steps is not None else _EVERY
        count = 1 if trainer.fast_dev_run else self.budget.samples  # type: ignore[attr-defined]
        with leaving_no_trace(pl_module), torch.no_grad():
            samples = TaskSamples(trainer, count, self.budget.seed, f"{self.owner}: samples for its KL budget")
            self._batches = [batch for _, batch in samples.batches()]
            divergence = Divergence(trainer, pl_module, self.outputs, self.owner)
            for batch in self._batches[:1]:
                divergence.logits(batch)

    def release(self) -> None:
        """Frees the samples."""
        self._batches = None

    @override
    def is_due(self, steps: int) -> bool:
        """Tells if the strength is to be chosen after `steps` steps of the task."""
        return self._batches is not None and steps >= self._next

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        """Measures the divergence of the present weights, the same on all ranks; NaN if nothing bears loss."""
        assert self._reference is not None
        assert self._batches is not None
        with leaving_no_trace(pl_module), torch.no_grad():
            divergence = Divergence(trainer, pl_module, self.outputs, self.owner)
            total, positions, _, _ = divergence.sums(self._swap(pl_module), self._batches).tolist()
        self._kl = total / positions if positions else math.nan
        return self._kl

    @override
    def observe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        return {"kl": self.measure(trainer, pl_module)}

    def _swap(self, pl_module: L.LightningModule) -> Callable[[], AbstractContextManager[None]]:
        assert self._reference is not None
        return self._reference.bring_to(pl_module)

    @override
    def choose(self, wanted: float, pull: float, task: str, steps: int) -> None:
        """Chooses the strength by the divergence that was measured last.

        Args:
            wanted: norm of the task's pull; 0 if the method has no such thing.
            pull: norm of the penalty's pull at strength 1, in the same unit; 0 if it has none.
            task: the task's name.
            steps: number of steps that the task has taken.
        """
        self._next = steps + 1  # after an overflow the strength is chosen at the next step
        kl, target = self._kl, self.budget.kl
        if kl is None or not math.isfinite(kl) or not math.isfinite(wanted) or not math.isfinite(pull):
            return
        self.largest = max(self.largest, wanted)
        if self._before is None and wanted > 0 and pull > 0 and kl > 0:
            # The divergence grows with the square of the distance from the anchor, and the pull with the distance.
            value = wanted / (pull * math.sqrt(target / kl))
        else:
            value = controlled_strength(self.value, kl, self._before, target)
        if pull > 0 and self.largest > 0:
            value = min(value, max(_PULL * self.largest / pull, self.value if kl > target else 0.0))
        if not math.isfinite(value) or value <= 0:
            return
        self.value, self._before, self._next = value, kl, steps + self._every
        self.chosen.append({"task": task, "step": steps, "kl": kl, "strength": value})

    @override
    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str) -> None:
        """Measures the divergence that a task has reached; call it before the anchor is set anew."""
        if self._batches is None:
            return
        kl = self.reached[task] = self.measure(trainer, pl_module)
        if kl > 1.5 * self.budget.kl:
            rank_zero_warn(
                f"{self.owner}: {task} has reached a KL of {kl:.3g} nats, and its budget is {self.budget.kl:g}; more"
                " steps, a smaller every, a lower learning rate or apply='proximal' leave more time to control it"
            )
        self.release()
        if self.budget.of == "previous":
            self._reference = None

    @override
    def state_bytes(self) -> int:
        """Returns the bytes of the reference."""
        return tensor_bytes(self._reference.copies) if self._reference is not None else 0

    @override
    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "value": self.value,
            "largest": self.largest,
            "next": self._next,
            "before": self._before,
            "begun": self._begun,
            "chosen": [dict(choice) for choice in self.chosen],
            "reached": dict(self.reached),
            "reference": self._reference.state() if self._reference is not None else None,
        }

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`; that of another kind of strength gives no more than its value."""
        self.value, self.largest = state["value"], state.get("largest", 0.0)
        if "reached" not in state:
            return
        self._next, self._before, self._begun = state["next"], state["before"], state["begun"]
        self.chosen = [dict(choice) for choice in state["chosen"]]
        self.reached = dict(state["reached"])
        kept = state["reference"]
        self._reference = StartingWeights.load(kept) if kept is not None else None

    @override
    def report(self) -> dict[str, Any]:
        """Returns the budget, the choices and what was reached."""
        return {
            "kl_budget": self.budget.kl,
            "of": self.budget.of,
            "chosen": list(self.chosen),
            "reached": dict(self.reached),
        }

    @override
    def sentences(self) -> list[str]:
        """Returns one sentence for each task."""
        reference = "the model before it" if self.budget.of == "previous" else "the base"
        last = {choice["task"]: choice["strength"] for choice in self.chosen}
        return [
            f"{self.owner}, {name}: a KL of {kl:.3g} nats from {reference}, its budget is {self.budget.kl:g}"
            + (f"; strength {last[name]:.3g} at the end" if name in last else "")
            + ("; the budget was not used up" if kl < _UNUSED * self.budget.kl else "")
            for name, kl in self.reached.items()
        ]

    @override
    def advice(self, owner: str, need: Need, diagnosis: Sequence[dict[str, Any]]) -> str | None:
        if not (diagnosis or self.reached):
            return None
        size = "smaller" if need == "keep" else "larger"
        return f"a {size} {owner}(strength=KLBudget(…)), {self.budget.kl:g} now"
