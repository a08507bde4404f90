"""The learning rate over one task: warm up, then decay."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupDecay(LambdaLR):
    """Linear warm-up to the peak, then a decay to a share of it, over the steps of one task.

    Each task gets a fresh one: the learning rate is warmed up and decayed again per task (Ibrahim et al. 2024).

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimizer steps of the task.
        warmup: share of the steps that warm up.
        decay: ``cosine``, ``linear``, or ``constant`` (no decay).
        final: share of the peak at the end.

    Raises:
        ValueError: if a share is outside [0, 1] or the decay unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.05,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        final: float = 0.1,
    ) -> None:
        for name, value in (("warmup", warmup), ("final", final)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a share between 0 and 1")
        if decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"decay={decay!r}: expected 'cosine', 'linear' or 'constant'")
        warmup_steps = math.ceil(warmup * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
            shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[decay]
            return final + (1 - final) * shape

        super().__init__(optimizer, factor)
