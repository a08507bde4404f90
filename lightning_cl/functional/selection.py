"""Rankings of samples. The first k samples of a ranking represent all samples well, for every k."""

from __future__ import annotations

import torch
from torch import Tensor


def herding(features: Tensor, count: int) -> list[int]:
    """Chooses samples whose mean is near the mean of all (Welling 2009; iCaRL, Rebuffi et al. 2017, algorithm 4).

    The k-th is ``argmin_x ‖μ − (φ(x) + Σ_{j<k} φ(p_j)) / k‖``, with features of length 1, as in iCaRL.

    Memory: a copy of `features`. Compute: ``count`` products of a matrix with a vector.

    Args:
        features: ``[samples, width]``.
        count: number of samples to choose; all, if there are fewer.

    Returns:
        their indices, in the order in which they were chosen; the best first.
    """
    points = torch.nn.functional.normalize(features.float(), dim=1)
    mean = points.mean(0)
    total = torch.zeros_like(mean)
    lengths = points.square().sum(1)
    left = torch.ones(len(points), dtype=torch.bool, device=points.device)
    chosen: list[int] = []
    for k in range(1, min(count, len(points)) + 1):
        # ‖μ − (φ + s)/k‖² up to a constant: ‖φ‖²/k² − 2 φ·(μ − s/k)/k
        distance = lengths / k**2 - 2 / k * (points @ (mean - total / k))
        best = int(distance.masked_fill(~left, torch.inf).argmin())
        chosen.append(best)
        left[best] = False
        total += points[best]
    return chosen


def k_center(features: Tensor, count: int) -> list[int]:
    """Chooses samples such that every other sample is near a chosen one (Sener & Savarese 2018, algorithm 1).

    The choice is greedy: first the sample nearest to the mean, then always the one farthest from those chosen. The
    largest distance from a sample to its nearest chosen one is at most twice the smallest possible.

    Memory: a copy of `features`. Compute: ``count`` products of a matrix with a vector.

    Args:
        features: ``[samples, width]``.
        count: number of samples to choose; all, if there are fewer.

    Returns:
        their indices, in the order in which they were chosen.
    """
    points = features.float()
    if len(points) == 0 or count < 1:
        return []
    first = int((points - points.mean(0)).square().sum(1).argmin())
    chosen = [first]
    nearest = (points - points[first]).square().sum(1)
    left = torch.ones(len(points), dtype=torch.bool, device=points.device)
    left[first] = False
    while len(chosen) < min(count, len(points)):
        farthest = int(nearest.masked_fill(~left, -1.0).argmax())
        chosen.append(farthest)
        left[farthest] = False
        nearest = torch.minimum(nearest, (points - points[farthest]).square().sum(1))
    return chosen
