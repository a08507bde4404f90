"""Actions of a guard against forgetting, each by itself, and the ladder that they form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_cl.core.placement import fit_to, full_cpu, trainable_parameters
from lightning_cl.core.precision import multiply_learning_rate

ACTIONS = ("warn", "replay", "lr", "interpolate", "rollback", "stop")
_SHARES = (0.75, 0.5, 0.25, 0.0)  # of the way from the safe weights to the present ones


class Remedies:
    """Changes of a task's training that hold to its end: its learning rate, and its replayed share.

    They survive a rollback: what the checkpoint does not have of them is applied again.

    Args:
        cap: the largest replayed share.

    Attributes:
        lr_factor: the factor of all learning rates.
        share: the replayed share; None: as planned.
        pending: True after a rollback, until they are applied.
    """

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.lr_factor, self.share = 1.0, None
        self.pending = False
        self._applied: tuple[float, float | None] = (1.0, None)  # in the checkpoint that the run went back to

    lr_factor: float
    share: float | None

    def halve_lr(self, trainer: L.Trainer) -> str:
        """Halves the learning rates of all groups, for all that their schedules give later."""
        self.lr_factor *= 0.5
        if not self.pending:
            _multiply(trainer, 0.5)
        return f"learning rate times {self.lr_factor:g} in all"

    def raise_replay(self, trainer: L.Trainer) -> str | None:
        """Doubles the replayed share, up to the cap; returns None where nothing is stored or the cap is reached."""
        loader: Any = trainer.train_dataloader
        if not getattr(loader, "stores", False):
            return None
        planned = loader.replayed_share
        now = planned if self.share is None else self.share
        target = min(2.0 * now, max(self.cap, planned))
        if target <= now:
            return None
        self.share = target
        if not self.pending:
            self._replay(trainer)
        return f"replayed share {now:.0%} → {target:.0%}"

    def _replay(self, trainer: L.Trainer) -> None:
        loader: Any = trainer.train_dataloader
        assert self.share is not None
        planned = loader.replayed_share
        loader.replay_more((self.share - planned) / (1.0 - planned))

    def went_back(self, applied: Mapping[str, Any]) -> None:
        """The run has gone back to a checkpoint in which only `applied` was in effect."""
        self.pending, self._applied = True, (applied["lr_factor"], applied["share"])

    def catch_up(self, trainer: L.Trainer) -> None:
        """Applies what the checkpoint did not have, before its first batch."""
        self.pending = False
        lr_factor, share = self._applied
        if self.lr_factor != lr_factor:
            _multiply(trainer, self.lr_factor / lr_factor)
        if self.share is not None and self.share != share:
            self._replay(trainer)

    def state(self) -> dict[str, Any]:
        """Returns what is in effect, as numbers."""
        return {"lr_factor": self.lr_factor, "share": self.share}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.lr_factor, self.share, self.pending = state["lr_factor"], state["share"], False


def _multiply(trainer: L.Trainer, factor: float) -> None:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for optimizer in trainer.optimizers:
        multiply_learning_rate(optimizer, schedulers, factor)


def copy_of(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Returns copies of the trainable parameters, where they are."""
    return {name: p.detach().clone() for name, p in trainable_parameters(pl_module).items()}


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies on the CPU."""
    return {name: full_cpu(tensor) for name, tensor in weights.items()}


@torch.no_grad()
def interpolate_back(
    pl_module: L.LightningModule, safe: Mapping[str, Tensor], excess: Callable[[], float]
) -> float | None:
    """Moves the trainable parameters towards safe ones, as little as brings the excess to 0 or less.

    Shares of 3/4, 1/2, 1/4 and 0 of the way from the safe weights are tried in this order; the last is not measured.
    Factors of low-rank adapters are moved one by one.

    Args:
        pl_module: the module.
        safe: name to weights that were safe.
        excess: measures how far the present weights are above what is allowed.

    Returns:
        the share of the way that is left; None if no parameter has safe weights.
    """
    now = {name: p for name, p in trainable_parameters(pl_module).items() if name in safe}
    if not now:
        return None
    end = {name: p.detach().clone() for name, p in now.items()}
    for share in _SHARES:
        for name, p in now.items():
            start = fit_to(safe[name], p, end[name])
            p.copy_(start if share == 0.0 else torch.lerp(start.to(end[name]), end[name], share))
        if share == 0.0 or excess() <= 0.0:
            return share
    return None
