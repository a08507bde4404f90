"""The learning rate over one task, and over all of them."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_cl.arguments import check_choice, check_share, is_integer


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
            check_share(name, value)
        check_choice("decay", decay, ("cosine", "linear", "constant"), "'cosine', 'linear' or 'constant'")
        warmup_steps = math.ceil(warmup * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
            shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[decay]
            return final + (1 - final) * shape

        super().__init__(optimizer, factor)


class InfiniteLR(LambdaLR):
    """One schedule over all tasks: warm up, cool down to a constant learning rate, and stay there.

    The infinite schedule of Ibrahim et al. 2024 (arXiv:2403.08763, "infinite learning rate schedules"; the phases as
    formulas: Singh et al. 2025, arXiv:2503.02844, eq. 1). The first task warms up linearly to the peak and cools down
    along a cosine to a constant share of it; later tasks start at the constant rate and are not warmed up again, which
    is what makes a model forget. For data that keeps coming: nothing about the number of tasks has to be known.

    Each task gets a fresh one, which is told by :meth:`begin_task` which task it is; ``CausalLM`` does so.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimizer steps of the task.
        warmup: share of the first task's steps that warm up.
        cooldown: share of the first task's steps that cool down from the peak to the constant rate.
        constant: the constant learning rate, as a share of the peak.
        anneal: share of each task's steps, its last ones, that decay exponentially from the constant rate to the final
            one. 0, the default, never anneals: a next task that starts at the constant rate after it would be warmed up
            again. Anneal where the weights at a task's end are to be used, and not to be trained on.
        final: share of the peak that annealing ends at.

    Raises:
        ValueError: if a share is outside [0, 1], the three shares of the steps are more than 1 together, or annealing
            cannot go from `constant` down to `final`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.05,
        cooldown: float = 0.25,
        constant: float = 0.5,
        anneal: float = 0.0,
        final: float = 0.1,
    ) -> None:
        shares = {"warmup": warmup, "cooldown": cooldown, "constant": constant, "anneal": anneal, "final": final}
        for name, value in shares.items():
            check_share(name, value)
        if warmup + cooldown + anneal > 1 + 1e-9:
            raise ValueError(
                f"warmup={warmup!r}, cooldown={cooldown!r}, anneal={anneal!r}: shares of the same steps, expected at"
                f" most 1 together, got {warmup + cooldown + anneal:g}"
            )
        if constant == 0:
            raise ValueError("constant=0: expected a share above 0; all tasks but the first would learn nothing")
        if anneal > 0 and not 0 < final <= constant:
            raise ValueError(
                f"final={final!r}: annealing decays exponentially to it, expected a share above 0 and at most constant"
                f" ({constant!r})"
            )
        self.task_index = 0
        warm_end = max(1, round(warmup * total_steps)) if warmup > 0 else 0
        cool_end = max(warm_end, round((warmup + cooldown) * total_steps))
        anneal_steps = round(anneal * total_steps)

        def factor(step: int) -> float:
            start = cool_end if self.task_index == 0 else 0
            if step < start:
                if step < warm_end:
                    return (step + 1) / warm_end
                progress = (step - warm_end) / (cool_end - warm_end)
                return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * progress))
            begin = max(total_steps - anneal_steps, start)
            if anneal_steps == 0 or step < begin:
                return constant
            progress = min((step - begin) / max(total_steps - begin, 1), 1.0)
            return float(constant * (final / constant) ** progress)

        super().__init__(optimizer, factor)

    def begin_task(self, index: int) -> None:
        """Says which task this is, before its first step.

        Args:
            index: 0 for the first task of the sequence.

        Raises:
            ValueError: if it is no such number.
            RuntimeError: if a step has been taken.
        """
        if not is_integer(index, 0):
            raise ValueError(f"begin_task(index={index!r}): expected the task's number, from 0")
        if self.last_epoch != 0:
            raise RuntimeError(
                f"begin_task(index={index}): {self.last_epoch} steps are taken; each task needs a schedule of its own"
            )
        self.task_index = index
        self._last_lr: list[float | Tensor] = []
        for group, peak, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = peak * factor(0)
            self._last_lr.append(group["lr"])
