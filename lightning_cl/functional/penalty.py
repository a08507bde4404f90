"""The quadratic penalty that EWC, SI and their relatives share.

::

    penalty(θ) = strength / 2 · Σ_i importance_i · (θ_i − anchor_i)²

The ½ is part of the definition, so the gradient is ``strength · importance · (θ − anchor)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def quadratic_penalty(
    parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor], strength: float
) -> Tensor:
    """The penalty's value, differentiable, as a scalar.

    Args:
        parameters: name to current value θ.
        anchor: name to the value to stay at; names that are missing here are not penalised.
        importance: name to a non-negative weight of the same shape.
        strength: the factor λ.
    """
    total = torch.zeros((), dtype=torch.float32)
    for name in anchor:
        difference = parameters[name].float() - anchor[name]
        total = total.to(difference.device) + (importance[name] * difference.square()).sum()
    return 0.5 * strength * total


@torch.no_grad()
def add_penalty_gradient_(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    strength: float,
    scale: float = 1.0,
) -> None:
    """``θ.grad += scale · strength · importance · (θ − anchor)`` in place, without a graph.

    One temporary of the size of the largest parameter; three reads and one write per parameter.

    Args:
        parameters: name to parameter; one without ``.grad`` takes no part in this step and is skipped.
        anchor: name to the value to stay at.
        importance: name to weight.
        strength: the factor λ.
        scale: the factor that the other gradients carry (a loss scale that is not undone yet).
    """
    for name, reference in anchor.items():
        parameter = parameters[name]
        if parameter.grad is None:
            continue
        difference = parameter.detach().float() - reference  # in 16 bits the products below would underflow
        weight = importance[name]
        if parameter.grad.dtype == difference.dtype == weight.dtype:
            parameter.grad.addcmul_(weight, difference, value=scale * strength)
        else:
            parameter.grad.add_(difference.mul_(weight).mul_(scale * strength).to(parameter.grad.dtype))


@torch.no_grad()
def proximal_step_(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    strength: float,
    learning_rate: float,
    applied: dict[str, Tensor] | None = None,
) -> None:
    """``θ ← anchor + (θ − anchor) / (1 + learning_rate · strength · importance)`` in place.

    The exact minimiser of ``penalty(θ') + ‖θ' − θ‖² / (2 · learning_rate)``: an implicit step, which is stable for
    every strength. The explicit gradient step overshoots once ``learning_rate · strength · importance`` exceeds 1, and
    diverges beyond 2.

    Args:
        parameters: name to parameter.
        anchor: name to the value to stay at.
        importance: name to weight.
        strength: the factor λ.
        learning_rate: the optimizer's current learning rate for these parameters.
        applied: where several penalties are applied one after another in one step: name to the sum of
            ``learning_rate · strength · importance`` of those before, to which this one is added. With
            ``q_k / (1 + Σ_{j≤k} q_j)`` in place of ``q_k / (1 + q_k)`` the steps together are the exact step of the
            penalties' sum, in any order.
    """
    if strength == 0.0 or learning_rate == 0.0:
        return  # bit for bit: anchor + (θ − anchor) is not always θ in floating point
    for name, reference in anchor.items():
        parameter = parameters[name]
        # θ − (θ − anchor) · q / (1 + q): a weight of importance 0 moves by exactly nothing.
        q = importance[name].float() * min(learning_rate * strength, torch.finfo(torch.float32).max)
        if applied is None:
            total = q + 1.0
        else:
            total = applied[name].add_(q) + 1.0 if name in applied else applied.setdefault(name, q.clone()) + 1.0
        # An overflow gives inf / inf; its limit is 1: the anchor.
        q.div_(total).nan_to_num_(nan=1.0)
        if parameter.dtype == torch.float32:
            parameter.sub_(q.mul_(parameter - reference))
        else:
            parameter.copy_(parameter.float() - q * (parameter.float() - reference))  # rounded once


@torch.no_grad()
def merge_quadratics(
    importance: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    new_importance: Mapping[str, Tensor],
    new_anchor: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Adds one quadratic to another: any number of tasks needs one importance and one anchor.

    ``½Σ F_a (θ−a)² + ½Σ F_b (θ−b)² = ½Σ (F_a+F_b) (θ−m)² + c`` with ``m = (F_a a + F_b b) / (F_a+F_b)`` and
    ``c = ½Σ F_a F_b / (F_a+F_b) · (a−b)²``.

    Args:
        importance: ``F_a``; a name that is missing here counts as zero.
        anchor: ``a``.
        new_importance: ``F_b``.
        new_anchor: ``b``.

    Returns:
        importance ``F_a+F_b``, anchor ``m`` (the new anchor where both importances are zero), and the constant ``c``.
    """
    merged_importance, merged_anchor, constant = {}, {}, 0.0
    for name, b in new_anchor.items():
        f_b = new_importance[name]
        if name not in importance:
            merged_importance[name], merged_anchor[name] = f_b.clone(), b.clone()
            continue
        f_a, a = importance[name], anchor[name]
        total = f_a + f_b
        share = torch.where(total > 0, f_a / total, torch.zeros_like(total))  # F_a / (F_a + F_b)
        gap = a - b
        merged_importance[name], merged_anchor[name] = total, b + share * gap
        constant += 0.5 * float((share * f_b * gap.square()).sum(dtype=torch.float64))
    for name in importance.keys() - new_anchor.keys():
        merged_importance[name], merged_anchor[name] = importance[name].clone(), anchor[name].clone()
    return merged_importance, merged_anchor, constant


@torch.no_grad()
def zero_non_finite_(importance: Mapping[str, Tensor]) -> int:
    """Sets what is NaN or infinite to 0 in place: one such weight would make the whole model NaN in the next task.

    Returns:
        The number of such weights.
    """
    count = 0
    for f in importance.values():
        wrong = ~f.isfinite()
        found = int(full_value(wrong.sum()))
        if found:
            f.masked_fill_(wrong, 0.0)
        count += found
    return count


@torch.no_grad()
def normalize_importance(importance: Mapping[str, Tensor]) -> float:
    """Divides all importances in place by their global mean, so that strengths compare between models.

    Args:
        importance: name to non-negative tensor.

    Returns:
        The mean that was divided out; 0.0 (and nothing is changed) where there is nothing to normalise.
    """
    count = sum(f.numel() for f in importance.values())
    if count == 0:
        return 0.0
    mean = sum(float(full_value(f.sum(dtype=torch.float64))) for f in importance.values()) / count
    if mean > 0:
        for f in importance.values():
            f.div_(mean)
    return mean


def full_value(tensor: Tensor) -> Tensor:
    """The whole value of a reduction over a sharded tensor; that of an ordinary one as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor is not None else tensor
