"""Factors and parts that precision and sharding bring between a method and its parameters."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.distributed.fsdp import FSDPModule


def reshard(pl_module: L.LightningModule) -> None:
    """Under FSDP2 the outermost parameters stay gathered after a validation: back to the shards that training steps."""
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def passes_in_step(pl_module: L.LightningModule) -> bool:
    """Returns True under FSDP2: a forward pass gathers weights from all ranks, so all must make it."""
    return any(isinstance(module, FSDPModule) for module in pl_module.modules())


def amp_scale(trainer: L.Trainer) -> float:
    """The factor of the loss scaler in fp16, else 1."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def scale_learning_rate(optimizer: torch.optim.Optimizer, schedulers: list[Any], lr: float) -> None:
    """Scales an optimizer and its schedules so that the first parameter group's peak learning rate is `lr`."""
    first = optimizer.param_groups[0]
    multiply_learning_rate(optimizer, schedulers, lr / float(first.get("max_lr", first.get("initial_lr", first["lr"]))))


def multiply_learning_rate(optimizer: torch.optim.Optimizer, schedulers: list[Any], factor: float) -> None:
    """Multiplies the learning rates of an optimizer's groups, now and in all that its schedules give later."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in group:
                group[key] = group[key] * factor
    for scheduler in schedulers:
        for part in [scheduler, *getattr(scheduler, "_schedulers", [])]:
            if getattr(part, "optimizer", None) is not optimizer:
                continue
            for name in ("base_lrs", "max_lrs"):
                if hasattr(part, name):
                    setattr(part, name, [value * factor for value in getattr(part, name)])
            if hasattr(part, "eta_min"):
                part.eta_min = part.eta_min * factor
