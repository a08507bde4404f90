"""Interpolation between the weights before a task and the weights after it.

::

    θ ← θ_start + share · (θ_now − θ_start)

Wortsman et al. 2022 (WiSE-FT, CVPR, arXiv:2109.01903), eq. 1, take one such step at the end of a task. Sequential
fine-tuning with averaging (SFA; Soup to Go, 2025, arXiv:2501.05559) takes the same step several times during the task
and at its end. Its β is the weight of the start, so ``share = 1 − β``; with a period of 1 it is WiSE-FT.

Low-rank adapters are interpolated as products, not factor by factor:
:func:`~lightning_cl.functional.low_rank_sum` with the weights ``1 − share`` and ``share``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from lightning_cl.functional.tensors import check_fits, check_share, wide


@overload
def interpolate(start: Tensor, now: Tensor, share: float) -> Tensor: ...


@overload
def interpolate(start: Mapping[str, Tensor], now: Mapping[str, Tensor], share: float) -> dict[str, Tensor]: ...


@torch.no_grad()
def interpolate(
    start: Tensor | Mapping[str, Tensor], now: Tensor | Mapping[str, Tensor], share: float
) -> Tensor | dict[str, Tensor]:
    """``start + share · (now − start)``, of one tensor or of each tensor of a model.

    A share of 0 gives the start and a share of 1 gives the present weights, both bit for bit. In between, 16-bit
    weights are interpolated in fp32 and rounded once. The result has the type of `now` and shares no memory with the
    arguments.

    Memory: the result, and up to two fp32 temporaries of the largest tensor. Compute: one pass.

    Args:
        start: the weights before the task.
        now: the weights after it, of the same shapes; in a mapping, with the same names.
        share: of the way from the start to the present weights, from 0 to 1.

    Raises:
        ValueError: if the share is out of range, or if names, shapes or types do not fit.

    Example:
        >>> import torch
        >>> interpolate({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([2.0, 0.0])}, share=0.5)
        {'w': tensor([1., 2.])}
    """
    check_share("share", share, zero=True)
    if isinstance(start, Tensor) and isinstance(now, Tensor):
        return _interpolate("start", start, now, share)
    if isinstance(start, Tensor) or isinstance(now, Tensor):
        raise ValueError(
            f"start, now: {type(start).__name__} and {type(now).__name__}, expected two tensors or two mappings"
        )
    if different := sorted(start.keys() ^ now.keys()):
        where = "now" if different[0] in start else "start"
        raise ValueError(f"{where}: no tensor {different[0]!r}, expected the same names in `start` and `now`")
    return {name: _interpolate(f"start[{name}]", start[name], tensor, share) for name, tensor in now.items()}


def averaging_steps(steps: int, period: float) -> tuple[int, ...]:
    """The steps of a task after which SFA interpolates: every ``period · steps``, and the last one.

    Steps that are no integers are rounded to the nearest, halves upwards. A period shorter than one step means every
    step.

    Args:
        steps: the number of optimizer steps of the task.
        period: the distance between two interpolations as a share of the task, above 0 and up to 1.

    Returns:
        Ascending numbers of steps, counted from 1. The last is `steps`.

    Raises:
        ValueError: if `steps` is below 1, or if the period is out of range.

    Example:
        >>> averaging_steps(steps=100, period=0.3)
        (30, 60, 90, 100)
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}, expected at least 1")
    check_share("period", period)
    distance = max(1.0, period * steps)
    times = math.floor(steps / distance * (1 + 1e-9))  # 1 / 0.1 · 0.1 and the like
    during = (math.floor(k * distance + 0.5) for k in range(1, times + 1))
    return tuple(sorted({min(step, steps) for step in during} | {steps}))


def _interpolate(argument: str, start: Tensor, now: Tensor, share: float) -> Tensor:
    check_fits(argument, start, now, of="`now`")
    if share == 0.0:  # 0 times infinity, and the sign of −0 + 0, would not give every bit
        return start.to(now.device, now.dtype, copy=True)
    if share == 1.0:
        return now.clone()
    start = start.to(now.device)
    kind = torch.promote_types(wide(start).dtype, wide(now).dtype)
    return torch.lerp(start.to(kind), now.to(kind), share).to(now.dtype)
