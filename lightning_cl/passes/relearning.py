"""A few training steps whose result is thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.passes.passes import leaving_no_trace, training_loss


@contextmanager
def thrown_away(pl_module: L.LightningModule) -> Iterator[None]:
    """Gives the module back its trainable parameters and their gradients, bit for bit, when the block ends.

    Inside, the module is in evaluation mode (:func:`~lightning_cl.passes.passes.leaving_no_trace`). The parameters keep
    their memory addresses, as optimizers and DDP need.

    Memory: a copy of the trainable parameters.
    """
    parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    kept = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
    with leaving_no_trace(pl_module):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for parameter, value, gradient in kept:
                    parameter.copy_(value)
                    parameter.grad = gradient


def peak_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Returns the learning rate of each group that its schedule multiplies; the present one if there is no schedule."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def train_steps(
    trainer: L.Trainer, pl_module: L.LightningModule, batches: Sequence[Any], steps: int, rates: Sequence[float]
) -> None:
    """Trains the module by a fresh optimizer of the run's class and settings, at constant learning rates.

    Nothing that methods add takes part: no penalty, no replay. Call it inside :func:`thrown_away`.

    Args:
        trainer: inside a fit.
        pl_module: its module.
        batches: on the device; they are repeated until there were enough steps.
        steps: number of steps, each on one batch.
        rates: learning rate of each of the optimizer's groups.

    Raises:
        MisconfigurationException: if a second optimizer of this class cannot be made.
    """
    used = trainer.optimizers[0]
    groups = [
        {
            **{key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")},
            "params": [parameter for parameter in group["params"] if parameter.requires_grad],
            "lr": rate,
        }
        for group, rate in zip(used.param_groups, rates, strict=True)
    ]
    try:
        make: Any = type(used)
        optimizer = make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"RecoveryProbe: a second {type(used).__name__} cannot be made from the groups of the first ({error}); use"
            " an optimizer of torch.optim, or leave the probe out"
        ) from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    limit = trainer.gradient_clip_val
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = training_loss(trainer, pl_module, batches[step % len(batches)])
            if loss is None or not loss.requires_grad:
                continue
            loss.backward()
            if limit and trainer.gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(parameters, float(limit))
            elif limit:
                torch.nn.utils.clip_grad_norm_(parameters, float(limit))
            optimizer.step()
