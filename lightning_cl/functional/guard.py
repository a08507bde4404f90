"""Statistics of a guard against forgetting: paired losses, bounds that hold at every look, and decisions.

A loss of one held-out sequence now, less the loss of the same sequence at a reference, is a paired difference. Most of
the spread between sequences cancels in it. The mean of these differences gets a confidence sequence: Robbins' normal
mixture (1970; Howard, Ramdas, McAuliffe and Sekhon 2021, arXiv:1810.08240, section 3.2), here over the standardised
mean and with the variance unknown, as in the Bayes factor of the t-test. With ``t = mean_n · sqrt(n) / sd_n``, the
boundary solves ::

    (1 + n ρ²)^(−1/2) · [ (1 + t² / (n − 1)) / (1 + t² / ((n − 1)(1 + n ρ²))) ]^(n/2) = 1 / α

so that it is right for normal differences at every n of at least 2, also where n is small and α tiny. It does not hold
for a few sequences that lose very much: up to ``1 − α^(1/n)`` of all sequences may be unlike each of the n. For large n
it is
``mean_n ± sd_n · sqrt( 2 (n ρ² + 1) / (n² ρ²) · log( sqrt(n ρ² + 1) / α ) )``, the asymptotic confidence sequence of
Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2021, arXiv:2103.06476, theorem 2.2).

It holds for all n at once, so that more sequences may be looked at until the answer is clear. The weights change
between two looks, so each look has another mean to estimate. So the k-th look spends ``α / (k (k + 1))`` of the error
probability, which sums to α over any number of looks, and Bonferroni divides it among the tasks.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Decision = Literal["breach", "safe", "uncertain"]
"""``breach``: surely more than allowed; ``safe``: surely not more; ``uncertain``: neither is sure."""

LEAST_ALLOWED = 0.01
"""Nats that a task may always lose in the unit ``retained``: a task that gave nothing would be allowed nothing."""


def check_budget(name: str, budget: float | None, unit: str) -> float:
    """Checks a budget of forgetting.

    Args:
        name: of the argument, for messages.
        budget: the budget; None: 0.9 in the unit ``retained``.
        unit: ``retained`` or ``nats``.

    Returns:
        the budget.

    Raises:
        ValueError: if it is out of its range, or not given in the unit ``nats``.
    """
    if budget is None and unit == "nats":
        raise ValueError(f"unit='nats': give {name}, the rise of the loss to allow, as in {name}=0.05")
    budget = 0.9 if budget is None else budget
    known = isinstance(budget, (int, float)) and not isinstance(budget, bool) and math.isfinite(budget)
    if not known or budget < 0 or (unit == "retained" and budget >= 1):
        right = "a share of at least 0 and less than 1" if unit == "retained" else "nats, at least 0"
        raise ValueError(f"{name}={budget!r}: expected {right} (unit={unit!r})")
    return float(budget)


class Rise(NamedTuple):
    """The mean of paired differences of losses, in nats per sequence mean, and what is sure of it.

    Attributes:
        mean: D, the mean rise; infinite if a loss is not finite.
        error: SE, its standard error.
        size: n, the number of sequences.
        allowed: the rise that the budget allows.
        rise_margin: half the width of the bound around `mean`.
        margin: half the width of the bound around the mean of what exceeds the budget.
        excess: the mean of what exceeds the budget; above 0 is too much.
        decision: what is sure.
    """

    mean: float
    error: float
    size: int
    allowed: float
    rise_margin: float
    margin: float
    excess: float
    decision: Decision


def look_error(alpha: float, look: int, tasks: int) -> float:
    """Returns the error probability of one task at one look, ``α / (k (k + 1) T)``.

    Args:
        alpha: the error probability of all looks and tasks together, above 0 and below 1.
        look: k, the look's number from 1.
        tasks: T, the tasks that are looked at.
    """
    return alpha / (look * (look + 1) * max(tasks, 1))


def confidence_width(count: int, alpha: float, first: int) -> float:
    """Returns half the width of the confidence sequence after `count` samples, in standard deviations.

    ``ρ² = (−2 log α + log(−2 log α) + 1) / first`` makes it narrowest near `first` samples (the reference above,
    appendix B.2).

    Args:
        count: n, the number of samples.
        alpha: the error probability of both sides together, over all n.
        first: the number of samples of the first look.
    """
    log = -2.0 * math.log(alpha)
    rho = (log + math.log(log) + 1.0) / first
    inside = count * rho + 1.0
    ratio = math.exp(2.0 / count * math.log(math.sqrt(inside) / alpha))
    if ratio >= inside:
        return math.inf  # too few samples to be sure at this error probability
    return math.sqrt((count - 1) / count * (ratio - 1.0) / (1.0 - ratio / inside))


def check_confidence(argument: str, value: float) -> float:
    """A confidence as a float: below one half, the bounds are not defined.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.5 <= value < 1:
        raise ValueError(f"{argument}={value!r}: expected a confidence of at least 0.5 and less than 1")
    return float(value)


def paired_rise(
    now: Tensor, reference: Tensor, allowed: float | Tensor, alpha: float, first: int | None = None
) -> Rise:
    """Compares losses with their own references, and decides whether their mean rise exceeds what is allowed.

    Memory and compute: a few numbers for each sequence.

    Args:
        now: ``[n]``, the loss of each sequence.
        reference: ``[n]``, its loss at the reference.
        allowed: the rise that is allowed, in nats: a number, or ``[n]`` where it is estimated from the same sequences
            (the rise and what is allowed are then paired too).
        alpha: the error probability.
        first: the number of sequences of a first look; default: n.

    Raises:
        ValueError: if the shapes differ or there are fewer than two sequences.
    """
    if now.shape != reference.shape or now.ndim != 1 or len(now) < 2:
        raise ValueError(
            f"now and reference: shapes {list(now.shape)} and {list(reference.shape)}; expected the same [n], n of at"
            " least 2"
        )
    count = len(now)
    change = now.double() - reference.double()
    limit = torch.as_tensor(allowed, dtype=torch.float64).expand(count)
    mean_limit = float(limit.mean())
    if not bool(change.isfinite().all()):
        return Rise(math.inf, 0.0, count, mean_limit, 0.0, 0.0, math.inf, "breach")
    excess = change - limit
    width = confidence_width(count, alpha, first or count)
    rise_margin, margin = (sd * width if (sd := float(x.std())) > 0 else 0.0 for x in (change, excess))
    mean = float(excess.mean())
    decision: Decision = "breach" if mean - margin > 0 else "safe" if mean + margin <= 0 else "uncertain"
    error = float(change.std()) / math.sqrt(count)
    return Rise(float(change.mean()), error, count, mean_limit, rise_margin, margin, mean, decision)


def allowed_rise(unit: str, budget: float, reference: Tensor, before: Tensor | None = None) -> float | Tensor:
    """Returns the rise of the loss that a budget allows, in nats.

    Args:
        unit: ``nats``: `budget` itself. ``retained``: the share ``1 − budget`` of what training gave, which is
            ``before − reference`` of each sequence. If its mean is too small (:data:`LEAST_ALLOWED`), that least rise
            is allowed.
        budget: nats, or the share to be kept.
        reference: ``[n]``, the losses when the task was learnt.
        before: ``[n]``, the losses before its training. None, for a watched task: it keeps its budget if its loss rises
            by at most the share ``1 − budget`` of the reference loss.

    Returns:
        a number, or ``[n]``.
    """
    if unit == "nats":
        return budget
    gave = reference.double() if before is None else before.double() - reference.double()
    share = (1.0 - budget) * gave
    return share if bool(share.isfinite().all()) and float(share.mean()) >= LEAST_ALLOWED else LEAST_ALLOWED


def kept_share(now: Tensor, reference: Tensor, before: Tensor) -> float:
    """Returns the share of what training gave that is there now, ``(before − now) / (before − reference)``.

    It is NaN where training gave nothing.
    """
    gave = float((before.double() - reference.double()).mean())
    kept = float((before.double() - now.double()).mean())
    return kept / gave if math.isfinite(gave) and gave > 0 else math.nan
