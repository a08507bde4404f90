"""The plan of an epoch: it puts new and replayed samples together into batches at a given ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from lightning_cl.data.mixing.ratio import Curve, mean_odds, odds_at
from lightning_cl.random_state import seed_of as seed_of

MixMode = Literal["replace", "add"]
T = TypeVar("T")


def plan_batches(order: Sequence[T], batch_size: int, drop_last: bool = False) -> list[list[T]]:
    """Cuts an order of samples, or of blocks of them, into batches."""
    batches = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


class Source(NamedTuple):
    """Source of replayed samples.

    Attributes:
        draw: an endless stream of indices of samples, as the weight function takes them. It is best if any consecutive
            samples have nearly the mean weight (:func:`balanced_order`).
        mean_weight: mean weight of the drawn samples, in the long run.
        curve: the source's share of the total weight, over the task.
    """

    draw: Iterator[int]
    mean_weight: float
    curve: Curve


class Span(NamedTuple):
    """The part of a task that an epoch is.

    Attributes:
        epoch: number of earlier epochs of this task. The weight that they still owe is carried over, so that a ratio
            below one sample per epoch is kept too.
        epochs: length of the task in epochs, any positive number.
        shown: the share of each epoch that is trained on.
    """

    epoch: int = 0
    epochs: float = 1.0
    shown: float = 1.0

    def progress(self, share: float) -> float:
        """The progress of the task, from 0 to 1, when this share of the epoch is done."""
        return min((self.epoch * self.shown + share) / self.epochs, 1.0)


def plan_mixed_batches(
    order: Sequence[int],
    sources: Sequence[Source],
    weight: Callable[[int], int],
    batch_size: int,
    mode: MixMode,
    span: Span = Span(),  # noqa: B008
    drop_last: bool = False,
    length: int | None = None,
    multiple: int = 1,
) -> list[list[int]]:
    """One epoch of batches in which each source's samples carry its share of the total weight.

    The share is kept by error diffusion: a replayed sample comes next whenever that brings the running share nearer to
    its goal. So over any consecutive samples the share is off by about one sample.

    ``replace`` keeps the batch size. A pass over the new samples takes ``1 / (1 − ratio)`` times the batches, and their
    number is the same in every epoch (:func:`mixed_length`). ``add`` adds the replayed samples to full batches of new
    ones.

    Args:
        order: indices of the new samples of this epoch.
        sources: the sources of replayed samples.
        weight: loss-bearing tokens of a sample, or 1 where there are no tokens.
        batch_size: samples in a batch (in ``add`` mode, new samples in a batch).
        mode: ``replace`` or ``add``.
        span: the part of the task that this epoch is.
        drop_last: leave out a last batch that is not full.
        length: in ``replace`` mode, the number of batches; by default, computed from the weights of `order`.
        multiple: in ``add`` mode, a batch has a multiple of this many replayed samples, so that ranks have equal parts.
    """
    if mode == "add":
        return _added(order, sources, weight, batch_size, span, drop_last, multiple)
    if length is None:
        new_weight = sum(weight(i) for i in order)
        length = mixed_length(len(order), new_weight, sources, batch_size, drop_last)
    most = max(length * batch_size - len(order), 0)
    if span.epochs < 1 and not all(source.curve.is_constant for source in sources):
        # The task ends within this epoch, so the batches after its end are never seen.
        groups = interleave(order, sources, weight, span)
        return plan_batches([index for group in groups for index in group], batch_size, drop_last)[:length]
    slots = [index for group in interleave(order, sources, weight, span, most) for index in group]
    if drop_last:
        slots += [next(sources[0].draw) for _ in range(length * batch_size - len(slots))]
        return plan_batches(slots, batch_size, drop_last)[:length]
    return [slots[start:end] for start, end in cuts(len(slots), length, batch_size)]


def _added(
    order: Sequence[int],
    sources: Sequence[Source],
    weight: Callable[[int], int],
    batch_size: int,
    span: Span,
    drop_last: bool,
    multiple: int,
) -> list[list[int]]:
    new_weights = [weight(i) for i in order]
    debts = [
        Debt(source, weight, owed) for source, owed in zip(sources, _owed(sum(new_weights), sources, span), strict=True)
    ]
    curves = [source.curve for source in sources]
    mixed = []
    for positions in plan_batches(range(len(order)), batch_size, drop_last):
        batch = [order[p] for p in positions]
        odds = odds_at(curves, span.progress((positions[0] + 0.5 * len(positions)) / len(order)))
        for debt, factor in zip(debts, odds, strict=True):
            debt.owed += factor * sum(new_weights[p] for p in positions)
            while debt.owed >= multiple * debt.next_weight / 2:
                batch += [debt.pay() for _ in range(multiple)]
        mixed.append(batch)
    return mixed


class Debt:
    """The weight that is owed to one source, and the source's next sample.

    Args:
        source: the source of replayed samples.
        weight: a function that gives the weight of a sample.
        owed: the weight owed at first.
    """

    def __init__(self, source: Source, weight: Callable[[int], int], owed: float = 0.0) -> None:
        self._draw, self._weight, self.owed = source.draw, weight, owed
        self.next = next(source.draw)
        self.next_weight = weight(self.next)

    @property
    def is_due(self) -> bool:
        """Returns True if the running share is nearer to its goal with the next sample than without."""
        return self.owed >= self.next_weight / 2

    def pay(self) -> int:
        """Returns the next sample and subtracts its weight from the debt."""
        paid = self.next
        self.owed -= self.next_weight
        self.next = next(self._draw)
        self.next_weight = self._weight(self.next)
        return paid


def interleave(
    order: Sequence[int],
    sources: Sequence[Source],
    weight: Callable[[int], int],
    span: Span = Span(),  # noqa: B008
    most: int | None = None,
) -> Iterator[list[int]]:
    """Gives each new sample with the replayed ones that follow it, by error diffusion.

    Args:
        order: indices of the new samples of this epoch.
        sources: the sources of replayed samples.
        weight: loss-bearing tokens of a sample, or 1 where there are no tokens.
        span: the part of the task that this epoch is.
        most: the most replayed samples; by default, as many as are due.
    """
    new_weights = [weight(i) for i in order]
    debts = [
        Debt(source, weight, owed) for source, owed in zip(sources, _owed(sum(new_weights), sources, span), strict=True)
    ]
    curves = [source.curve for source in sources]
    constant = odds_at(curves, 0.0) if all(curve.is_constant for curve in curves) else None
    count = 0
    for position, (index, new_weight) in enumerate(zip(order, new_weights, strict=True)):
        group = [index]
        odds = constant or odds_at(curves, span.progress((position + 0.5) / len(order)))
        for debt, factor in zip(debts, odds, strict=True):
            debt.owed += factor * new_weight
            while (most is None or count < most) and debt.is_due:
                group.append(debt.pay())
                count += 1
        yield group


def _owed(new_weight: float, sources: Sequence[Source], span: Span) -> list[float]:
    """The weight of each source's replayed samples that the error diffusion of earlier epochs still owes, about."""
    curves = [source.curve for source in sources]
    odds = mean_odds(curves, 0.0, span.progress(0.0))
    owed = []
    for source, factor in zip(sources, odds, strict=True):
        expected = factor * new_weight / source.mean_weight * span.epoch  # replayed samples so far, a real number
        owed.append((expected - math.floor(expected + 0.5)) * source.mean_weight)
    return owed


def cuts(slots: int, length: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Returns begin and end of each of the `length` batches of an epoch of `slots` samples.

    All batches but the last are full. If the last would be small, the last two share the remaining samples. Batch norm
    cannot train on a single sample, and replay must not cause such a batch.
    """
    length = min(length, slots)
    ends = [min(batch_size * (i + 1), slots) for i in range(length)]
    if slots <= batch_size * (length - 1):
        ends = [slots * (i + 1) // length for i in range(length)]  # too few samples to fill all batches but the last
    elif length > 1 and slots - ends[-2] < batch_size / 2:
        begin = ends[-3] if length > 2 else 0
        ends[-2] = begin + math.ceil((slots - begin) / 2)
    return zip([0, *ends[:-1]], ends, strict=True)


def balanced_order(order: Sequence[T], weight: Callable[[T], float], pending: int = 32) -> list[T]:
    """An order of the same items in which any consecutive items have nearly the mean weight.

    Among some pending items, the one comes next that brings the running sum nearest to the average. So the number of
    replayed samples in an epoch hardly depends on the length of the drawn ones. Items that are hard to balance come
    late. A caller that starts at a random position of the cycle makes all items equally likely.
    """
    weights = [weight(i) for i in order]
    mean = sum(weights) / max(len(weights), 1)
    if len(set(weights)) < 2:
        return list(order)
    result, waiting, surplus = [], list(range(min(pending, len(order)))), 0.0
    following = iter(range(len(waiting), len(order)))
    while waiting:
        # Among equals, the item that has waited longest comes first.
        best = min(waiting, key=lambda position: abs(surplus + weights[position] - mean))
        waiting.remove(best)
        waiting += [position for position in [next(following, None)] if position is not None]
        result.append(order[best])
        surplus += weights[best] - mean
    return result


def mixed_length(
    samples: int, new_weight: float, sources: Sequence[Source], batch_size: int, drop_last: bool = False
) -> int:
    """The number of batches of an epoch in ``replace`` mode, the same for every epoch.

    Args:
        samples: number of new samples.
        new_weight: weight of the new samples.
        sources: the sources of replayed samples.
        batch_size: samples in a batch.
        drop_last: leave out a last batch that is not full.
    """
    odds = mean_odds([source.curve for source in sources], 0.0, 1.0)
    expected = [f * new_weight / source.mean_weight for f, source in zip(odds, sources, strict=True)]
    if drop_last:
        return (samples + math.floor(sum(expected))) // batch_size
    return math.ceil((samples + sum(map(math.ceil, expected))) / batch_size)


def share_of_rank(batch: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This process's part of a batch of all ranks; samples are repeated if needed to make all parts equally large.

    Each rank takes every ``world_size``-th sample, so all ranks together see the batch that one process would see.
    """
    size = math.ceil(len(batch) / world_size)
    return [batch[(rank + i * world_size) % len(batch)] for i in range(size)]
