"""The replayed share of the batches, and its change over a task."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

PER_TASK = "1/t"
RatioLike = float | str | list[list[float]]


class Curve(NamedTuple):
    """A share that changes over a task, piecewise linear.

    Attributes:
        points: pairs of progress and share; progress rises, from 0 to 1.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def constant(cls, ratio: float) -> Curve:
        """A share that is the same from beginning to end."""
        return cls(((0.0, float(ratio)),))

    @property
    def is_constant(self) -> bool:
        """Returns True if the share never changes."""
        return all(ratio == self.points[0][1] for _, ratio in self.points)

    @property
    def largest(self) -> float:
        """The largest share."""
        return max(ratio for _, ratio in self.points)

    def at(self, progress: float) -> float:
        """The share at a progress in [0, 1]; before the first point and after the last, the share there."""
        after = bisect_right(self.points, (progress, math.inf))
        if after == 0 or after == len(self.points):
            return self.points[max(after - 1, 0)][1]
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[after]
        return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)


def check_ratio(value: Any) -> RatioLike:
    """A ratio as a user gives it.

    Args:
        value: a share in [0, 1), ``"1/t"``, or a list of pairs of progress and share.

    Raises:
        ValueError: if it is none of these.
    """
    if value == PER_TASK:
        return PER_TASK
    if isinstance(value, (list, tuple)):
        return _check_points(value)
    if not _is_share(value):
        raise ValueError(
            f"ratio={value!r}: expected a share in [0, 1), as 0.05 for five percent, '1/t', or a list of pairs of"
            " progress and share, as [[0, 0.25], [1, 0.05]]"
        )
    return float(value)


def curve_of(ratio: RatioLike, task_number: int) -> Curve:
    """The share over one task.

    Args:
        ratio: the result of :func:`check_ratio`. ``"1/t"`` gives the new task and each earlier task the share 1/t.
        task_number: t, which is 1 for the first task.
    """
    if ratio == PER_TASK:
        return Curve.constant(1.0 - 1.0 / max(task_number, 1))
    if isinstance(ratio, list):
        return Curve(tuple((float(progress), float(share)) for progress, share in ratio))
    return Curve.constant(float(ratio))


def replays_anything(ratio: RatioLike) -> bool:
    """Returns True if the share is above 0 at some moment of some task."""
    return ratio == PER_TASK or curve_of(ratio, 1).largest > 0


def odds_at(curves: Sequence[Curve], progress: float) -> list[float]:
    """Replayed weight of each source per weight of new samples: ``r_s / (1 − Σ r)``."""
    ratios = [curve.at(progress) for curve in curves]
    rest = 1.0 - sum(ratios)
    return [ratio / rest for ratio in ratios]


def mean_odds(curves: Sequence[Curve], start: float, end: float) -> list[float]:
    """The mean of :func:`odds_at` from one progress of the task to another."""
    if all(curve.is_constant for curve in curves) or end <= start:
        return odds_at(curves, start)
    count = 256
    rows = [odds_at(curves, start + (end - start) * (i + 0.5) / count) for i in range(count)]
    return [sum(column) / count for column in zip(*rows, strict=True)]


def check_sum(curves: Sequence[Curve]) -> None:
    """Checks that all sources together leave room for new samples.

    Raises:
        ValueError: if they do not.
    """
    points = {progress for curve in curves for progress, _ in curve.points}
    total = max((sum(curve.at(progress) for curve in curves) for progress in points), default=0.0)
    if total >= 1:
        raise ValueError(
            f"ratio: the shares of all replayed samples add up to {total:.3g}; expected less than 1, so that there is"
            " room for new ones"
        )


def _is_share(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 <= value < 1


def _check_points(value: Sequence[Any]) -> list[list[float]]:
    pairs = [list(point) if isinstance(point, (list, tuple)) else [] for point in value]
    good = len(pairs) > 0 and all(len(pair) == 2 and _is_share(pair[1]) for pair in pairs)
    numbers = [pair[0] for pair in pairs] if good else []
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= 1 for x in numbers):
        good = False
    if not good or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(
            f"ratio={value!r}: expected pairs of progress, rising from 0 to 1, and a share in [0, 1), as"
            " [[0, 0.25], [1, 0.05]]"
        )
    return [[float(x), float(y)] for x, y in pairs]
