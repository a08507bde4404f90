"""Order in which methods are asked around an optimizer step, and when they change the weights at a task's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from lightning_cl.core.questions import Questions
from lightning_cl.core.run_state import RunState


def in_edit_order(methods: Sequence[Questions]) -> list[Questions]:
    """Sorts methods: the same order whatever the order in the Trainer's list, down to the rounding of sums."""
    return sorted(methods, key=lambda method: (method.edit_order, type(method).__name__))


def before_step(
    methods: Sequence[Questions],
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    optimizer: torch.optim.Optimizer,
    scale: float,
) -> None:
    """Asks when the gradients are complete: observers first, then edits.

    Args:
        methods: of the Trainer.
        trainer: the Trainer.
        pl_module: its module.
        optimizer: the optimizer.
        scale: the factor that the gradients carry.
    """
    ordered = in_edit_order(methods)
    for method in ordered:
        method.observe_gradients(trainer, pl_module, optimizer, scale)
    for method in ordered:
        method.edit_gradients(trainer, pl_module, optimizer, scale)


def after_step(
    methods: Sequence[Questions],
    run: RunState,
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Asks when the optimizer has made its step: edits of the weights first, then observers.

    Args:
        methods: of the Trainer.
        run: their run.
        trainer: the Trainer.
        pl_module: its module.
        optimizer: the optimizer.
    """
    ordered = in_edit_order(methods)
    run.applied.clear()
    for method in ordered:
        method.edit_weights(trainer, pl_module, optimizer)
    for method in ordered:
        method.after_step(trainer, pl_module, optimizer)


def consolidating(methods: Sequence[Questions]) -> list[Any]:
    """Returns the methods that change the weights at a task's end, in their order."""
    changing = [method for method in methods if method.consolidates]
    return sorted(changing, key=lambda method: (method.consolidate_order, type(method).__name__))
