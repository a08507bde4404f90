"""Paired comparisons: the same items before and after, so that an item's own difficulty cancels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_FLIPS = 10_000


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error ``sd / √n``, with ``n - 1`` in the variance (NaN for one value)."""
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The p-value of McNemar's exact test, two-sided: were as many items lost as gained?

    Only items whose answer changed count. Without an effect each is lost or gained with probability ½, so the smaller
    of both counts is binomial: ``p = min(1, 2 · P(X ≤ min(lost, gained)))``.

    Args:
        before: for each item, True if it was right.
        after: the same items, later.
    """
    pairs = list(zip(before, after, strict=True))
    lost, gained = sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def sign_flips(differences: Sequence[float], seed: int = 0) -> float:
    """The p-value of a permutation test of paired differences, two-sided: is their mean 0?

    Without an effect each difference could as well have the other sign. Up to 13 differences that are not 0 all signs
    are tried, else 10,000 drawn ones, with ``p = (1 + hits) / (1 + 10,000)``.

    Args:
        differences: one for each item.
        seed: for the drawn signs.

    Returns:
        the p-value; 1 if no difference is left; NaN if one is not finite.
    """
    if not all(math.isfinite(value) for value in differences):
        return math.nan
    moved = np.array([value for value in differences if value != 0], dtype=np.float64)
    if not len(moved):
        return 1.0
    if len(moved) <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_FLIPS, len(moved)))
    least = abs(float(moved.sum())) * (1 - 1e-12)  # the observed sum is one of the possible ones, up to rounding
    hits = int((np.abs(signs @ moved) >= least).sum())
    return hits / len(signs) if len(moved) <= 13 else (1 + hits) / (1 + _FLIPS)


def paired_p(before: Sequence[float], after: Sequence[float]) -> float:
    """The p-value of a change: by :func:`mcnemar` if all values are 0 or 1, else by :func:`sign_flips`.

    Args:
        before: a value for each item.
        after: the same items, later.
    """
    if {*before, *after} <= {0.0, 1.0}:
        return mcnemar([value == 1 for value in before], [value == 1 for value in after])
    return sign_flips([now - then for then, now in zip(before, after, strict=True)])
