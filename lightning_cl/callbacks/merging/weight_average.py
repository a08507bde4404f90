"""Exponential moving average of the weights, with which a task ends."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_share
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import all_parameters, fit_to, full_cpu, tensor_bytes, trainable_parameters
from lightning_cl.core.questions import Need

_REMAINS = 0.1  # of the weights at a task's start in its average: more is worth a warning


class WeightAverage(ContinualCallback):
    """Exponential moving average of the weights over a task's steps (Polyak & Juditsky 1992, with weights that decay).

    ::

        average ← decay · average + (1 − decay) · θ   after every optimizer step;   θ ← average   at a task's end

    The average starts with the weights that the task starts with, of which ``decay ** steps`` remains: with 0.999 a
    task needs thousands of steps, and a task of a few hundred wants 0.98. The next task starts from the average, and
    importances and anchors are taken after it. Only trainable parameters are averaged: no frozen base, and no buffers.
    The factors of an adapter are averaged one by one, since the average is over neighbours on one path. During a task
    the weights themselves are trained and validated. As a method against forgetting it is weak.

    Memory: one copy of the trainable parameters in fp32 (fp64 for fp64), in checkpoints too. Compute: one pass over
    them a step.

    Args:
        decay: of the average, from 0 (bit for bit training without this callback) to below 1.

    Attributes:
        average: parameter name to its average.

    Raises:
        ValueError: if `decay` is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import WeightAverage
        >>> method = WeightAverage(decay=0.98)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["decay"]
        0.98
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = check_share("decay", decay)
        if self.decay == 1.0:
            raise ValueError("decay=1.0: expected a number from 0 to below 1, as 0.999; with 1 nothing would be learnt")
        self.average: dict[str, Tensor] = {}
        self._steps = 0
        self._remains: dict[str, float] = {}  # for each task the share of its start in its end

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = {name: _wide(p) for name, p in trainable_parameters(pl_module).items()}
        self._steps = 0

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = all_parameters(pl_module)
        missing = sorted(self.average.keys() - parameters.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has the average of {missing[0]!r} (and {len(missing) - 1} more), which"
                f" {type(pl_module).__name__} does not have; was the model changed since the checkpoint?"
            )
        for name, tensor in self.average.items():
            self.average[name] = fit_to(tensor, parameters[name], parameters[name])

    @override
    @torch.no_grad()
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._steps += 1
        for name, parameter in trainable_parameters(pl_module).items():
            if id(parameter) in stepped and name in self.average:
                average = self.average[name]
                average.lerp_(parameter.detach().to(average.dtype), 1.0 - self.decay)

    @override
    @torch.no_grad()
    def consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        remains = self._remains[self.task.name] = self.decay**self._steps
        if self.decay > 0.0:
            parameters = all_parameters(pl_module)
            for name, average in self.average.items():
                parameters[name].copy_(average)
        if remains > _REMAINS and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__}(decay={self.decay:g}): {self.task} had so few steps that {remains:.0%} of its"
                " average are the weights it started with; a smaller decay forgets them sooner"
            )
        self.average = {}

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "average": {name: full_cpu(tensor) for name, tensor in self.average.items()},
            "steps": self._steps,
            "remains": dict(self._remains),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.average, self._steps = dict(state["average"]), state["steps"]
        self._remains = dict(state["remains"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.average)

    @override
    def report(self) -> dict[str, Any]:
        return {
            "decay": self.decay,
            "remains": dict(self._remains),
            "sentences": [
                f"{type(self).__name__}, {name}: the task ended with the average of its steps, in which"
                f" {remains:.2%} are the weights it started with"
                for name, remains in self._remains.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "learn" and max(self._remains.values(), default=0.0) > _REMAINS:
            return f"a smaller {type(self).__name__}(decay=…), {self.decay:g} now"
        return None


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
