"""The importance of Riemannian Walk (Chaudhry et al. 2018, ECCV, arXiv:1801.10112, eqs. 6 to 8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def add_square_(squares: Tensor, gradient: Tensor) -> Tensor:
    """``squares += g²`` in place, or nothing where a ``g²`` is NaN or infinite: it would stay in the average for ever.

    Args:
        squares: the sum since the last update of F, fp32.
        gradient: of a whole parameter; in fp32 it is overwritten.

    Returns:
        True if it was added: a bool without axes on the device, so that nobody waits for a GPU.
    """
    square = gradient.float().square_()
    is_finite = square.sum().isfinite()
    squares.add_(square.masked_fill_(~is_finite, 0.0))
    return is_finite


@torch.no_grad()
def running_fisher_(fisher: Tensor, squared_gradient: Tensor, rate: float) -> None:
    """``F ← α · g² + (1 − α) · F`` in place (eq. 6).

    Args:
        fisher: the running average, fp32.
        squared_gradient: the mean of squared gradients since the last call.
        rate: α.
    """
    fisher.lerp_(squared_gradient.float(), rate)


@torch.no_grad()
def path_score_(score: Tensor, drop: Tensor, fisher: Tensor, displacement: Tensor, damping: float) -> None:
    """``s += max(ΔL, 0) / (½ F Δθ² + ε)`` in place (eq. 7): the drop of the loss per distance in distribution.

    Args:
        score: the running score, fp32.
        drop: ``ΔL``, what this weight contributed to the drop of the loss since the last call.
        fisher: the running Fisher.
        displacement: ``Δθ`` since the last call.
        damping: ε, in units of :func:`path_length`. Where both are zero, or something is not finite, nothing is added.
    """
    length = path_length(fisher, displacement).add_(damping)
    new = drop.clamp(min=0).div_(length).masked_fill_(length == 0, 0.0)
    score.add_(new.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))


@torch.no_grad()
def path_length(fisher: Tensor, displacement: Tensor) -> Tensor:
    """``½ F Δθ²``: the distance in distribution that a weight has gone (eq. 7's denominator, without ε).

    Args:
        fisher: the running Fisher.
        displacement: ``Δθ`` since the last call.
    """
    return displacement.float().square().mul_(fisher).mul_(0.5)


@torch.no_grad()
def to_unit_range(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All values between their common smallest (0) and largest (1), as eq. 8 needs them to add them up.

    Args:
        values: name to tensor; all zeros stay zeros.
    """
    if not values:
        return {}
    low = min(float(value.min()) for value in values.values())
    high = max(float(value.max()) for value in values.values())
    if high <= low:
        return {name: torch.zeros_like(value) for name, value in values.items()}
    return {name: (value - low) / (high - low) for name, value in values.items()}
