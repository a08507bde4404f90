"""The path integral of Synaptic Intelligence (Zenke, Poole & Ganguli 2017, ICML, eqs. 3 to 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def path_integral_step_(omega: Tensor, gradient: Tensor, step: Tensor) -> None:
    """``ω += −g · Δθ`` in place: what this step contributed to the drop of the loss (eq. 3).

    Args:
        omega: the running sum, fp32, of the parameter's shape.
        gradient: the gradient of the task's loss before the step, without any penalty.
        step: ``Δθ``, the step that was really taken. In fp32 it is overwritten, so that no copy is needed.

    A step that is not finite adds nothing, so one overflow cannot spoil the sum for ever.
    """
    product = step.float().mul_(gradient).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    omega.sub_(product)


@torch.no_grad()
def path_importance(
    omega: Mapping[str, Tensor], displacement: Mapping[str, Tensor], damping: float
) -> dict[str, Tensor]:
    """``max(ω, 0) / (Δ² + ξ)``: one task's share of Ω (eq. 5; the clamp at zero is the code's, not the paper's).

    Args:
        omega: name to the path integral over the task.
        displacement: name to ``Δ = θ_end − θ_start``.
        damping: ξ, in units of a squared parameter change. Where it exceeds ``Δ²`` by far (small learning rates), the
            importance is the bare path integral divided by ξ.

    Returns:
        name to fp32 tensor.
    """
    return {
        name: integral.clamp(min=0).div_(displacement[name].float().square().add_(damping))
        for name, integral in omega.items()
    }
