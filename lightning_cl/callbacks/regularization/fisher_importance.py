"""Penalties whose importance is a Fisher information, measured with gradients of single samples."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_positive
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.callbacks.regularization.sampled_importance import SampledImportance
from lightning_cl.core.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.passes.fisher_losses import ESTIMATORS, Estimator, FisherLosses
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.sample_sums import look_at_one


class FisherImportance(SampledImportance):
    """A quadratic penalty whose importance is a Fisher information; a subclass decides on its form.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        estimator: source of the labels: ``sample``, ``empirical``, ``exact``, ``batched`` or ``auto``.
        samples: number of samples of a task to measure on.
        decay: γ, the share of the importance that is kept from task to task.
        normalize: divide each task's Fisher by its mean before it is added.
        outputs: a function ``outputs(module, batch)`` that gives the logits; None: they are found automatically.
        batch_size: samples measured at once; default: the training loader's.
        apply: ``gradient`` or ``proximal``.
        last_task: True measures the last task of a sequence too.
        share: the penalty's share of the task's pull, with ``strength="auto"``.
        state_dtype: type of the importance.
        state_device: ``model`` or ``cpu``.

    Raises:
        ValueError: if an argument is out of its range.
    """

    measures = "Fisher"

    def __init__(
        self,
        strength: Strength,
        estimator: Estimator,
        samples: int,
        decay: float,
        normalize: bool,
        outputs: OutputsFunction | None,
        batch_size: int | None,
        apply: Apply,
        last_task: bool,
        share: float,
        state_dtype: StateDtype,
        state_device: StateDevice,
    ) -> None:
        super().__init__(strength, samples, batch_size, last_task, apply, share, state_dtype, state_device)
        self.estimator = check_choice("estimator", estimator, ESTIMATORS)
        check_positive("decay", decay, "a number above 0 and at most 1 (1 forgets nothing)", most=1)
        self.decay, self.normalize, self.outputs = decay, normalize, outputs

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: gradients of single samples cannot be taken from")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, type(self).__name__)

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_start(trainer, pl_module)
        if self.tasks_done == 0 and (self.estimator in ("sample", "exact") or self.outputs is not None):
            look_at_one(trainer, pl_module, self.losses(trainer, pl_module))

    def losses(self, trainer: L.Trainer, pl_module: L.LightningModule) -> FisherLosses:
        """Returns the losses, chosen by the estimator, whose gradients are measured."""
        assert self.task is not None
        name = type(self).__name__
        return FisherLosses(trainer, pl_module, self.estimator, self.outputs, self.task.index, name)

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"normalize": self.normalize, "samples": self.samples}
