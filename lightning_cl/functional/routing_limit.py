"""The distance from a task up to which a prompt of some length is taken for one of it; a part of the router."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEAREST = 64
"""Prompts that the limit of a length is read from, at least: those of the most similar lengths."""


class DistanceLimit:
    """Reads the limit for a length from the distances of a task's own prompts.

    The squared distance of a mean of n tokens is about a + b / n. That curve is fitted to all prompts. The limit is the
    curve times a quantile of the ratios to it, among the prompts whose lengths are most similar.

    Args:
        distances: squared ones of some of a task's prompts: ``[prompts]``.
        lengths: numbers of tokens of these, at least 1: ``[prompts]``.
        quantile: share of the prompts that are to lie within the limit.

    Example:
        >>> import torch
        >>> from lightning_cl.functional.routing_limit import DistanceLimit
        >>> lengths = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> limit = DistanceLimit(1 + 80 / lengths, lengths, quantile=0.99)
        >>> [round(limit.at(length), 3) for length in (1, 4, 8, 50)]
        [81.0, 21.0, 11.0, 11.0]
    """

    def __init__(self, distances: Tensor, lengths: Tensor, quantile: float) -> None:
        self._lengths, self._quantile, self._longest = lengths, quantile, float(lengths.max())
        # A line through n · d² = a · n + b, whose noise is about the same for all n.
        scaled, about = lengths * distances, lengths - lengths.mean()
        slope = float((about * scaled).sum() / about.square().sum().clamp(min=1e-12))
        self._slope = min(max(slope, 0.0), float(scaled.mean() / lengths.mean()))
        self._constant = float(scaled.mean()) - self._slope * float(lengths.mean())
        self._ratios = distances / (self._slope + self._constant / lengths).clamp(min=1e-300)

    def at(self, length: float) -> float:
        """Returns the limit for prompts of `length` tokens; beyond the longest known length it is that one's."""
        length = min(length, self._longest)
        away = (self._lengths.log() - math.log(length)).abs()
        nearest = away <= away.sort().values[min(_NEAREST, len(away)) - 1]
        ratio = torch.quantile(self._ratios[nearest], self._quantile)
        return float(ratio) * (self._slope + self._constant / length)


def row_keys(rows: Tensor) -> Tensor:
    """A number from 0 for each row of fp32, as good as random, that depends on the row's bits alone."""
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) | 1).to(rows.device)
    keys = (rows.contiguous().view(torch.int32).long() * factors).sum(1)  # wraps around
    keys = (keys ^ (keys >> 31)) * -7046029254386353131
    return (keys ^ (keys >> 29)) & (2**63 - 1)
