"""The path integral of Synaptic Intelligence (Zenke, Poole & Ganguli 2017, ICML, eqs. 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_cl.functional.penalty import full_value


@torch.no_grad()
def path_integral_step_(omega: Tensor, gradient: Tensor, step: Tensor) -> None:
    """``ω += −g · Δθ`` in place: what this step contributed to the drop of the loss (eq. 3).

    Args:
        omega: the running sum, fp32, of the parameter's shape.
        gradient: the gradient of the task's loss before the step, without any penalty.
        step: ``Δθ``, the step that was really taken. In fp32 it is overwritten, so that no copy is needed.

    A step that is not finite adds nothing, so one overflow cannot spoil the sum for ever.

    Example:
        >>> import torch
        >>> from lightning_cl.functional import path_integral_step_
        >>> omega = torch.zeros(2)
        >>> path_integral_step_(omega, gradient=torch.tensor([1.0, 2.0]), step=torch.tensor([-0.5, 0.25]))
        >>> omega
        tensor([ 0.5000, -0.5000])
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
        damping: ξ, in units of a squared parameter change: a number, or that of :func:`relative_damping`. Where it
            exceeds ``Δ²`` by far, the importance is the bare path integral divided by ξ. Where both are zero, as in a
            task that moved nothing, the importance is zero.

    Returns:
        name to fp32 tensor.
    """
    importance = {}
    for name, integral in omega.items():
        distance = displacement[name].float().square().add_(damping)
        importance[name] = integral.clamp(min=0).div_(distance).masked_fill_(distance == 0, 0.0)
    return importance


@torch.no_grad()
def relative_damping(squares: Iterable[Tensor]) -> float:
    """The mean over all weights of a squared displacement, as a damping in its own unit.

    The papers' constants suit the learning rates of their experiments. At the rates of fine-tuning ``Δ²`` is many
    orders of magnitude smaller than 0.1, and the division by it is switched off. Relative to its own mean it is as
    strong at every rate: a weight that moved as far as the average one has its importance halved.

    Args:
        squares: what the damping is added to, one tensor per parameter.

    Returns:
        The mean of what is finite, over sharded tensors as a whole; 0.0 where there is nothing.
    """
    total, count = 0.0, 0
    for square in squares:
        finite = square.isfinite()
        total += float(full_value(square.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(dtype=torch.float64)))
        count += int(full_value(finite.sum()))
    return total / count if count else 0.0
