"""Interpolation between the weights before a task and those after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_positive, check_share
from lightning_cl.callbacks.merging.low_rank_pairs import merge_pair, pairs_in
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.loops import steps_of_current_task
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import (
    all_parameters,
    fit_to,
    full_cpu,
    set_weight_,
    tensor_bytes,
    trainable_parameters,
    whole,
)
from lightning_cl.core.questions import Need
from lightning_cl.functional.interpolate import averaging_steps, interpolate


class Interpolate(ContinualCallback):
    """Interpolation of weights at a task's end (WiSE-FT, Wortsman et al. 2022, eq. 1), or during it too (SFA).

    ::

        θ ← θ_old + share · (θ_new − θ_old)

    It needs no data and costs nothing at inference: the result is one ordinary model. It is the first method to try on
    a pretrained model that already knows the domains; there a smaller share keeps more of the base. A model that knows
    little of its tasks loses what it has just learnt. It composes with replay and with penalties: their importances
    and anchors are taken after it. With ``during`` it is Sequential Fine-tuning with Averaging (2025,
    arXiv:2501.05559), whose β is ``1 − share``.

    Low-rank adapters are interpolated as products ``B A``, and brought back to their rank by a singular value
    decomposition: the factors by themselves have no meaning.

    Memory: one copy of the trainable parameters, in their own type, in checkpoints too. Compute: one pass over them
    at a task's end, and with ``during`` a few more in each task.

    Args:
        share: of the way from the old weights to the new ones, from 0 (nothing of the task is kept) to 1 (bit for bit
            training without this callback).
        anchor: the old weights: ``task``, those that the task started with, or ``start``, those before the first task.
        during: interpolate also after each such share of the task's steps, as 0.25; the optimizer's state is kept.

    Attributes:
        anchor_weights: parameter name to the old weights.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import Interpolate
        >>> method = Interpolate(0.5)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["share"]
        0.5
    """

    edit_order = 2

    def __init__(
        self, share: float = 0.5, anchor: Literal["task", "start"] = "task", during: float | None = None
    ) -> None:
        super().__init__()
        self.share = check_share("share", share)
        self.anchor = check_choice("anchor", anchor, ("task", "start"))
        if during is not None:
            check_positive("during", during, "a share of a task's steps above 0 and at most 1, or None", most=1)
        self.during = during
        self.anchor_weights: dict[str, Tensor] = {}
        self._moments: tuple[int, ...] = ()  # steps of this task after which to interpolate
        self._steps = 0
        self._moved: dict[str, float] = {}  # for each task, ‖θ_new − θ_old‖ relative to ‖θ_old‖ before the last step

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and pairs_in(trainable_parameters(pl_module)):
            reason = f"{type(self).__name__}: products of low-rank factors cannot be taken apart with"
            refuse_sharded(trainer, reason, rows_are_fine=True)

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = trainable_parameters(pl_module)
        known = self.anchor_weights if self.anchor == "start" else {}
        self.anchor_weights = {
            name: known[name] if name in known else p.detach().clone() for name, p in now.items()
        } | {name: tensor for name, tensor in known.items() if name not in now}
        self._steps, self._moments = 0, ()
        if self.during is not None:
            self._moments = averaging_steps(self._steps_of_task(trainer), self.during)[:-1]  # the last is the end

    def _steps_of_task(self, trainer: L.Trainer) -> int:
        count = steps_of_current_task(trainer, self.run.limits)
        if count is None:
            raise MisconfigurationException(
                f"{type(self).__name__}(during={self.during}): nobody knows how many steps {self.task} has; set"
                " max_steps, or leave during out"
            )
        return count

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = all_parameters(pl_module)
        missing = sorted(self.anchor_weights.keys() - parameters.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has the old weights of {missing[0]!r} (and {len(missing) - 1} more), which"
                f" {type(pl_module).__name__} does not have; was the model changed since the checkpoint?"
            )
        for name, tensor in self.anchor_weights.items():
            self.anchor_weights[name] = fit_to(tensor, parameters[name], parameters[name].detach())

    @override
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._steps += 1
        if self._steps in self._moments:
            self._interpolate(pl_module)

    @override
    def consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        self._moved[self.task.name] = self._interpolate(pl_module)

    @torch.no_grad()
    def _interpolate(self, pl_module: L.LightningModule) -> float:
        """Moves the weights back; returns how far they had moved, relative to the old weights' norm."""
        now = {name: p for name, p in trainable_parameters(pl_module).items() if name in self.anchor_weights}
        old = {name: self.anchor_weights[name] for name in now}
        moved = _norm({name: now[name].float() - old[name].float() for name in now}) / max(_norm(old), 1e-30)
        if self.share == 1.0:
            return moved
        for name, value in self._between(old, now).items():
            set_weight_(now[name], value)
        return moved

    def _between(self, old: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the interpolated weights: of low-rank factors by their product, of all others one by one."""
        if self.share == 0.0:
            return dict(old)
        pairs = pairs_in(now)
        in_pairs = {name for pair in pairs for name in pair}
        result = {name: interpolate(old[name], p, self.share) for name, p in now.items() if name not in in_pairs}
        for pair in pairs:
            sets = [{name: whole(values[name].detach()) for name in pair} for values in (old, now)]
            result |= merge_pair(pair, sets, (1.0 - self.share, self.share))
        return result

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "anchor": {name: full_cpu(tensor) for name, tensor in self.anchor_weights.items()},
            "steps": self._steps,
            "moments": list(self._moments),
            "moved": dict(self._moved),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.anchor_weights = dict(state["anchor"])
        self._steps, self._moments = state["steps"], tuple(state["moments"])
        self._moved = dict(state["moved"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.anchor_weights)

    @override
    def report(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "anchor": self.anchor,
            "during": self.during,
            "moved": dict(self._moved),
            "sentences": [
                f"{type(self).__name__}, {name}: training moved the weights by {moved:.2%} of their norm, of which"
                f" {self.share:.0%} stays"
                for name, moved in self._moved.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "begin" or (need == "learn" and self.share == 1.0) or (need == "keep" and self.share == 0.0):
            return None
        return f"a {'smaller' if need == 'keep' else 'larger'} {type(self).__name__}(share=…), {self.share:g} now"


def _norm(tensors: Mapping[str, Tensor]) -> float:
    squares = (tensor.detach().float().square().sum(dtype=torch.float64) for tensor in tensors.values())
    total = sum(float(whole(square)) for square in squares)
    return math.sqrt(total)
