"""Methods that put weights back into bounds after every step of the optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.callbacks.architecture.linear_layers import LINEAR, check_targets
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import clean_name, trainable_parameters, whole
from lightning_cl.core.precision import reshard
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.passes.passes import progress

Others = Literal["frozen", "trained"]


class ProjectedWeights(ContinualCallback):
    """A method that lets weights move only outside of a protected space.

    The optimizer makes its step, and then each weight's protected part is put back. It is not enough to edit gradients:
    Adam divides them entry by entry, and weight decay does not look at them.

    Args:
        targets: ``linear``, or names of layers.
        others: ``frozen`` or ``trained``: all parameters but the targets' weights.
        every: so many steps between two projections.

    Attributes:
        history: for each task a dictionary of what was protected, and the largest share of a step that was measured in
            protected space.

    Raises:
        ValueError: if an argument is out of its range.
    """

    owns = "the trainable parameters"
    edit_order = 1  # after proximal penalties

    def __init__(self, targets: str | Sequence[str] = LINEAR, others: Others = "frozen", every: int = 1) -> None:
        super().__init__()
        self.targets = check_targets(targets)
        self.others = check_choice("others", others, ("frozen", "trained"))
        self.every = check_integer("every", every, 1)
        self.history: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._before: dict[str, Tensor] = {}  # the matrices of a window's beginning, where its step is measured
        self._frozen: set[str] = set()  # by this callback, in this module

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def matrices(self) -> Mapping[str, Tensor]:
        """The matrices of this task that are kept in bounds, which share memory with the parameters."""

    @abstractmethod
    def project_(self, name: str, matrix: Tensor) -> None:
        """Puts the protected part of a matrix back, in place."""

    @abstractmethod
    def protected(self, name: str, step: Tensor) -> Tensor:
        """Returns the squared norm of the protected part of a matrix's step."""

    def note(self, protects: Mapping[str, Any]) -> None:
        """Begins the entry of this task in the history."""
        assert self.task is not None
        self._steps, self._before = 0, {}
        self.history[self.task.name] = {**protects, "protected_share": None}

    def freeze_others(self, pl_module: nn.Module, targets: Sequence[nn.Parameter]) -> None:
        """Freezes all parameters but some, and remembers which of them trained."""
        kept = {id(parameter) for parameter in targets}
        for name, parameter in trainable_parameters(pl_module).items():
            if id(parameter) not in kept:
                self._frozen.add(name)
                parameter.requires_grad_(False)

    # ------------------------------------------------------------------ answers

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, f"{type(self).__name__}: matrices cannot be taken apart with", rows_are_fine=True)

    @override
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if self._steps % self.every == 0:
            measures = self._steps == 0 or self._is_logged(trainer)
            self._before = {name: matrix.clone() for name, matrix in self.matrices().items()} if measures else {}

    def _is_logged(self, trainer: L.Trainer) -> bool:
        """Returns True if there is a logging step in the window that begins."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (trainer.global_step + self.every) // every > trainer.global_step // every

    @override
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            self._project()

    def _project(self) -> None:
        for name, matrix in self.matrices().items():
            self.project_(name, matrix)

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if self._steps % self.every != 0 or not self._before:
            return
        protected, total = 0.0, 0.0
        for name, matrix in self.matrices().items():
            step = matrix.float() - self._before.pop(name).float()
            protected += float(self.protected(name, step))
            total += float(whole(step.square().sum()))
        self._before = {}
        share = protected / total if total > 0 else 0.0
        self.log_scalar("protected_share", share)
        assert self.task is not None
        entry = self.history[self.task.name]
        entry["protected_share"] = max(share, entry["protected_share"] or 0.0)

    @property
    @override
    def consolidates(self) -> bool:
        return self.every > 1  # the last steps of a task, or the best weights of it, may not have been projected

    @override
    def consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._project()

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        for name, parameter in pl_module.named_parameters():
            if clean_name(name) in self._frozen:
                parameter.requires_grad_(True)
        self._frozen = set()

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"steps": self._steps, "history": {name: dict(entry) for name, entry in self.history.items()}}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self._steps, self._before = state["steps"], {}
        self.history = {name: dict(entry) for name, entry in state["history"].items()}


def on_one_rank_each(
    trainer: L.Trainer, tensors: Mapping[str, Tensor], compute: Callable[[str, Tensor], Any], label: str
) -> dict[str, Any]:
    """Computes something of each tensor on one rank, and gives it to all: decompositions differ in their last bits.

    Args:
        trainer: inside ``fit``.
        tensors: by name, the same on all ranks. A sharded one is gathered when it is its turn.
        compute: from a name and a whole tensor; gives tensors on the CPU, in plain containers.
        label: what the progress display says.
    """
    names, size = list(tensors), trainer.world_size
    mine: dict[str, dict[str, Any]] = {}
    turns = range(0, len(names), size)
    for first in progress(trainer, turns, label, len(turns)):
        own: dict[str, Tensor] = {}
        for rank, name in enumerate(names[first : first + size]):
            tensor = whole(tensors[name])  # on all ranks
            if rank == trainer.global_rank:
                own[name] = tensor
        mine |= {name: compute(name, tensor) for name, tensor in own.items()}
    return {name: value for part in from_all_ranks(mine) for name, value in part.items()}
