"""The questions that a continual-learning method answers: all that coordinator, checks and loops know of it.

A method never overrides Lightning's hooks for these moments itself. One
:class:`~lightning_cl.core.coordinator.TaskCoordinator` per Trainer asks all methods in the right order, whatever
their order in ``Trainer(callbacks=[…])``:

==================  ====================================================================================
question            when
==================  ====================================================================================
on_run_start        a run starts or resumes, before a checkpoint is read
on_sequence_start   ``fit_tasks`` starts a sequence anew, without a checkpoint
check_loader        before any training, for the loader of every task
build               the module is built and its weights are not loaded yet: in a fit, an evaluation, a prediction and
                    every kind of resume
choose_trainable    after ``build``, before the optimizers are made
mix_into            the loader of a task is built
start_from          once per task, never on a resume inside it: the weights that the task starts with
on_task_start       after ``start_from``
place               whenever training starts or resumes: move tensors to the model's device
on_batch            a batch is about to be trained on
extra_loss          after the module's own loss, before the backward pass
observe_gradients   gradients are complete, unscaled, reduced over ranks, not clipped; nobody has edited them
edit_gradients      after all observers, before clipping; in the order of ``edit_order``
edit_weights        right after a real optimizer step
after_step          after all weight edits
close_path          once per task, after all other callbacks' ``on_train_end``: the last look at the weights as
                    training left them
consolidate         after ``close_path``: change the weights, in the order of ``consolidate_order``
on_task_end         after ``consolidate``: compute importances, anchors, teachers and buffers from the task's final
                    weights
deployed            whenever outputs are wanted: the matrix, evaluations, predictions, prompts
at_boundary         between tasks, outside ``trainer.fit``, only with ``fit_tasks``; in the order of
                    ``boundary_order``
after_boundary      when all have answered ``at_boundary``, in the same order: time to report
on_sequence_end     ``fit_tasks`` returns: leave the module as it is to be used
end_cost            the plan is printed: return what the end of a task will take
advice              the report is written: name what could be changed of the method
==================  ====================================================================================

A method that adds samples to batches also answers the properties ``mixes`` and ``replays``. One that learns something
has ``continual_state``, ``load_continual_state`` and ``state_bytes``. The class attributes of :class:`Questions` say
what a method needs from other methods, and what it forbids them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_cl.core.run_state import RunState
from lightning_cl.data import TaskDataModule
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.data.mixing.contents import Trained
from lightning_cl.evaluation.sentences import Need
from lightning_cl.tasks import TaskPosition

Trait = Literal["shared parameters", "earlier outputs", "earlier samples"]
"""A thing of a run that methods rely on, and that others can take away.

``shared parameters``: later tasks train the parameters that earlier ones trained. ``earlier outputs``: a copy of the
trainable parameters gives back what the model computed before. ``earlier samples``: samples of earlier tasks may be
trained on in later ones.
"""


def answers(method: Any, question: str) -> bool:
    """Tells if a method overrides a question, and has not declared it unanswered."""
    return question not in method.unanswered and getattr(type(method), question) is not getattr(Questions, question)


class EndCost(NamedTuple):
    """Cost of what a method does with a task's own data at its end, for the plan."""

    what: str
    """In a word, as ``Fisher``."""
    samples: int
    batches: int
    per_sample: float
    """The time for a sample, relative to training on it once."""


class Questions(Callback):
    """The questions of a method; here each does nothing. The module's docstring has their order.

    State goes into ``checkpoint["lightning_cl"]`` and not through Lightning's ``state_dict``: Lightning checks for two
    states of one key when the Trainer is made, before two callbacks of one class can be told apart.

    Attributes:
        task: where in the sequence the run is; None before the first task.
        tasks_done: how many tasks this callback has seen to their end.
        run: what the run knows, from the Trainer's setup on (:class:`~lightning_cl.core.run_state.RunState`).
    """

    owns: str | None = None
    """A thing that only one callback of a Trainer may have, in words (``"the replayed part of the batches"``)."""

    edit_order: int = 0
    """Lower edits gradients first: penalties 0, projections 1."""

    ends_long: bool = False
    """True if its part of a task's end can take long: a checkpoint is written before, so that no training is lost."""

    consolidate_order: int = 0
    """Lower changes the weights first at a task's end: merges 0, what cuts a model into parts 1."""

    relies_on: frozenset[Trait] = frozenset()
    """Things of a run that the method cannot do without."""

    takes_away: Mapping[Trait, str] = MappingProxyType({})
    """Things of a run that the method leaves to no other, each with the reason and what to do; an error says so."""

    weakens: Mapping[Trait, str] = MappingProxyType({})
    """Things of a run of which the method leaves others only a part, each with the reason; a warning says so."""

    unanswered: frozenset[str] = frozenset()
    """Questions that the class answers and the method, with its settings, does not."""

    replays_first: bool = False
    """True if samples that it replays are there in the first task already."""

    boundary_order: int = 0
    """Lower evaluates first between tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.task: TaskPosition | None = None
        self.tasks_done = 0
        self.scalars: dict[str, float | Tensor] = {}
        self.run = RunState()

    # ------------------------------------------------------------------ questions

    def on_run_start(self, trainer: L.Trainer) -> None:
        """A run starts or resumes; nothing is read from a checkpoint yet."""

    def on_sequence_start(self) -> None:
        """A new sequence starts; the method may keep what it learnt before."""

    @property
    def mixes(self) -> bool:
        """True if there is something to mix into the next task's loader."""
        return False

    @property
    def replays(self) -> bool:
        """True if samples that are not the task's own come into the batches, now or later."""
        return False

    def check_loader(self, loader: Any, task: str) -> None:
        """Raises an error if the method cannot work with a task's training loader."""

    def mix_into(self, trainer: L.Trainer, loader: TaskBatches) -> None:
        """The loader of a task is built: add to it."""

    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        """The module is built, its weights are not loaded: add the parts that these tasks need.

        It is asked often, with more tasks as the run proceeds, and adds only what is missing. Random numbers come from
        the method's own seed.
        """

    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        """The optimizers are about to be made for a task: set ``requires_grad``."""

    def start_from(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A task is about to start, with other weights than the module has: set them."""

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A task starts: anchors, snapshots, fresh sums."""

    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training starts or resumes: move tensors to the device of the parameters."""

    def on_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, trained: Trained) -> None:
        """A batch is about to be trained on: `trained` lists its new samples on all ranks.

        It is not asked with loaders that do not know their samples.
        """

    def extra_loss(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
        """A term to add to the loss of this batch, with a graph; its scale is that of the module's own loss."""
        return None

    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        """Look at ``p.grad``, which carries the factor `scale` (1 except with a fused optimizer in fp16)."""

    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        """Change ``p.grad``, which carries the factor `scale`."""

    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Change parameters after the optimizer's step."""

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the parameters that this step ended with."""

    def close_path(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A task's training is done, and nothing has changed the weights since: the last look at them."""

    @property
    def consolidates(self) -> bool:
        """True if the method may change the weights at the end of this task."""
        return answers(self, "consolidate")

    def consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A task's training is done: change the weights before anything is measured or anchored."""

    def deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None
    ) -> AbstractContextManager[None]:
        """Returns a context in which the module computes what its user would get.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            task: the task whose data the module gets; None: unknown.
        """
        return nullcontext()

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A task ends: importances, buffers, teachers."""

    def at_boundary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        ckpt_path: str | None = None,
    ) -> None:
        """Between tasks, `trained` of them done: evaluate. The Trainer is free, the module on any device.

        With `ckpt_path` the run resumes from a boundary, and the module's weights are still in that file.
        """

    def after_boundary(self, trainer: L.Trainer, trained: int, final: bool) -> None:
        """All evaluations of this boundary are there; `final`: no task is left."""

    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """``fit_tasks`` returns after the last task: leave the module as it is to be used."""

    # ------------------------------------------------------------------ state

    def continual_state(self) -> dict[str, Any]:
        """Returns the state that must survive a crash: tensors and plain containers only."""
        return {}

    def load_continual_state(self, state: dict[str, Any]) -> None:
        """Restores :meth:`continual_state`."""

    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        """Returns what the end of a task takes, over all ranks; None for next to nothing.

        Args:
            trainer: the Trainer.
            loader: the task's own training loader.
            task: which of how many it is.
        """
        return None

    def state_bytes(self) -> int:
        """Returns the bytes of the state that the method keeps from task to task."""
        return 0

    def report(self) -> dict[str, Any]:
        """Returns the numbers and texts of this method for the run's report.

        ``sentences`` are printed. What is under ``sections`` gets a key of its own in ``report.json``.
        """
        return {}

    def advice(self, need: Need) -> str | None:
        """Names what could be changed of this method, by what it saw in the run; None for nothing.

        Args:
            need: ``keep`` more of earlier tasks, ``learn`` more of a new one, or ``begin`` to keep, which is asked
                where no method has an answer to ``keep``.
        """
        return None

    # ------------------------------------------------------------------ for methods

    def log_scalar(self, name: str, value: float | Tensor) -> None:
        """Logs ``continual/<class>/<name>`` with this step's other metrics; can be called in any question."""
        self.scalars[name] = value

    def is_log_step(self, trainer: L.Trainer) -> bool:
        """True if this optimizer step's metrics go to the logger; what costs time is measured only then."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (trainer.global_step + 1) % every == 0
