"""Which samples stand in which batch: the plan that joins new and replayed samples at a given ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

MixMode = Literal["replace", "add"]


def plan_batches(order: Sequence[int], batch_size: int, drop_last: bool = False) -> list[list[int]]:
    """Cuts an order of samples into batches."""
    batches = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def plan_mixed_batches(
    order: Sequence[int],
    draw: Iterator[int],
    weight: Callable[[int], int],
    mean_replay_weight: float,
    ratio: float,
    batch_size: int,
    mode: MixMode,
    epoch: int = 0,
    drop_last: bool = False,
    length: int | None = None,
    multiple: int = 1,
) -> list[list[int]]:
    """One epoch of batches in which replayed samples carry the share ``ratio`` of the total weight.

    The share is kept by error diffusion: a replayed sample comes next whenever that brings the running share nearer to
    ``ratio``. So over any window the share is off by about one sample.

    ``replace`` keeps the batch size: a pass over the new samples takes ``1 / (1 − ratio)`` times the batches, and their
    number is the same in every epoch (:func:`mixed_length`). ``add`` puts the replayed samples on top of full batches
    of new ones.

    Args:
        order: the new samples of this epoch, by index.
        draw: an endless stream of replayed samples, by index (any number that `weight` knows).
        weight: loss-bearing tokens of a sample, or 1 where there are no tokens.
        mean_replay_weight: mean of `weight` over what `draw` can give.
        ratio: the share of the replayed samples in the weight, in ``[0, 1)``.
        batch_size: samples in a batch (in ``add`` mode, new samples in a batch).
        mode: ``replace`` or ``add``.
        epoch: how many epochs of this task came before: what they owe is carried over, so that a ratio below one
            sample per epoch is kept too.
        drop_last: leave out a last batch that is not full.
        length: in ``replace`` mode, the number of batches; by default, from the weights of `order`.
        multiple: in ``add`` mode, replayed samples come in multiples of this many, so that ranks can share them.
    """
    odds = ratio / (1.0 - ratio)
    new_weights = [weight(i) for i in order]
    expected = odds * sum(new_weights) / mean_replay_weight  # replayed samples per epoch, a real number
    # owed: weight of replayed samples still to come. Error diffusion over the earlier epochs left about this much.
    owed = (epoch * expected - math.floor(epoch * expected + 0.5)) * mean_replay_weight
    replayed = _EvenDraws(draw, weight, mean_replay_weight)

    if mode == "add":
        mixed = []
        for positions in plan_batches(range(len(order)), batch_size, drop_last):
            batch = [order[p] for p in positions]
            owed += odds * sum(new_weights[p] for p in positions)
            while owed >= multiple * mean_replay_weight / 2:
                for _ in range(multiple):
                    batch.append(replayed.take())
                    owed -= weight(batch[-1])
            mixed.append(batch)
        return mixed

    if length is None:
        length = mixed_length(len(order), sum(new_weights), mean_replay_weight, ratio, batch_size, drop_last)
    most = max(length * batch_size - len(order), 0)
    slots: list[int] = []
    count = 0
    for index, new_weight in zip(order, new_weights, strict=True):
        slots.append(index)
        owed += odds * new_weight
        while count < most and owed >= weight(replayed.peek()) / 2:
            slots.append(replayed.take())
            owed -= weight(slots[-1])
            count += 1
    if drop_last:
        slots += [replayed.take() for _ in range(length * batch_size - len(slots))]
        return plan_batches(slots, batch_size, drop_last)[:length]
    return [slots[start:end] for start, end in _cuts(len(slots), length, batch_size)]


def _cuts(slots: int, length: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Where an epoch of so many samples is cut into `length` batches.

    All are full but the last. Where that would be small, the last two share what is left: replayed samples must not
    leave a batch with a single sample, which batch norm cannot train on.
    """
    length = min(length, slots)
    ends = [batch_size * (i + 1) for i in range(length - 1)] + [slots]
    if length > 1 and slots - ends[-2] < batch_size / 2:
        begin = ends[-3] if length > 2 else 0
        ends[-2] = begin + math.ceil((slots - begin) / 2)
    return zip([0, *ends[:-1]], ends, strict=True)


class _EvenDraws:
    """Draws in an order in which every stretch has nearly the mean weight.

    Of some pending draws the one is taken that brings the sum nearest to what so many samples weigh on average. So the
    number of replayed samples in an epoch hardly depends on whether long or short ones were drawn.
    """

    def __init__(self, draw: Iterator[int], weight: Callable[[int], int], mean: float, pending: int = 32) -> None:
        self._draw, self._weight, self._mean = draw, weight, mean
        self._pending = [next(draw) for _ in range(pending)]
        self._surplus = 0.0  # of the weights taken so far, over their number times the mean

    def peek(self) -> int:
        return min(self._pending, key=lambda i: abs(self._surplus + self._weight(i) - self._mean))

    def take(self) -> int:
        index = self.peek()
        self._pending.remove(index)  # the oldest first among equals: without weights, the order of the draws
        self._pending.append(next(self._draw))
        self._surplus += self._weight(index) - self._mean
        return index


def mixed_length(
    samples: int, new_weight: float, mean_replay_weight: float, ratio: float, batch_size: int, drop_last: bool = False
) -> int:
    """The number of batches of an epoch in ``replace`` mode, the same for every epoch."""
    expected = ratio / (1.0 - ratio) * new_weight / mean_replay_weight
    if drop_last:
        return (samples + math.floor(expected)) // batch_size
    return math.ceil((samples + math.ceil(expected)) / batch_size)


def share_of_rank(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This process's part of a global batch; the last batch wraps around so that all parts are of equal size.

    Taking every ``world_size``-th sample makes the union over all ranks the batch that one process would see.
    """
    size = math.ceil(len(batch) / world_size)
    return [batch[(rank + i * world_size) % len(batch)] for i in range(size)]
