"""Penalties whose importance is summed over the optimizer's steps while a task is trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import lightning as L
import torch
from typing_extensions import override

from lightning_cl.arguments import check_positive
from lightning_cl.callbacks.regularization.quadratic import (
    Apply,
    QuadraticPenalty,
    StateDevice,
    StateDtype,
    Strength,
)
from lightning_cl.callbacks.regularization.step_watch import StepWatch
from lightning_cl.core.placement import trainable_parameters


class PathImportance(QuadraticPenalty):
    """A quadratic penalty whose importance follows the path of training, without an extra pass over the data.

    A subclass names the parameters that it follows and reads each step from the
    :class:`~lightning_cl.callbacks.regularization.step_watch.StepWatch`.

    Memory: 8 bytes per trainable parameter while a task is trained (the gradient and the weights before each step), in
    addition to :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`. Compute per step: two copies
    per parameter.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        damping: the number added to the denominator of the importance, or ``auto``.
        normalize: divide the importance by its mean.
        apply: ``gradient`` or ``proximal``.
        share: the penalty's share of the task's pull, with ``strength="auto"``.
        state_dtype: type of the importance.
        state_device: ``model`` or ``cpu``.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        strength: Strength,
        damping: float | Literal["auto"],
        normalize: bool,
        apply: Apply,
        share: float,
        state_dtype: StateDtype,
        state_device: StateDevice,
    ) -> None:
        super().__init__(strength, apply, share, state_dtype, state_device)
        self.damping, self.normalize = check_damping(damping), normalize
        self._watch = StepWatch()

    def followed(self) -> Collection[str]:
        """Returns the names of the parameters whose steps are summed."""
        raise NotImplementedError

    @override
    @torch.no_grad()
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        super().observe_gradients(trainer, pl_module, optimizer, scale)
        self._watch.before(trainable_parameters(pl_module), self.followed(), scale)

    @override
    def continual_state(self) -> dict[str, Any]:
        return super().continual_state() | {"spoilt_steps": int(self._watch.spoilt)}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self._watch.spoilt = torch.tensor(state.get("spoilt_steps", 0))  # older checkpoints do not have it

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"damping": self.damping, "normalize": self.normalize}


def check_damping(damping: float | str) -> float | Literal["auto"]:
    """Returns a damping, or ``auto``.

    Raises:
        ValueError: if it is neither a positive, finite number nor ``auto``.
    """
    if damping == "auto":
        return "auto"
    return check_positive("damping", damping, "a positive, finite number, or 'auto'")
