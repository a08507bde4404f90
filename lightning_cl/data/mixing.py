"""Which samples stand in which batch: the plan that joins new and replayed samples at a given ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

MixMode = Literal["replace", "add"]
T = TypeVar("T")


def plan_batches(order: Sequence[T], batch_size: int, drop_last: bool = False) -> list[list[T]]:
    """Cuts an order of samples, or of blocks of them, into batches."""
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
        draw: an endless stream of replayed samples, by index (any number that `weight` knows), best one in which every
            stretch has nearly the mean weight (:func:`balanced_order`).
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
    if mode == "add":
        odds = ratio / (1.0 - ratio)
        new_weights = [weight(i) for i in order]
        owed = _owed(sum(new_weights), mean_replay_weight, ratio, epoch)
        pending = next(draw)
        mixed = []
        for positions in plan_batches(range(len(order)), batch_size, drop_last):
            batch = [order[p] for p in positions]
            owed += odds * sum(new_weights[p] for p in positions)
            while owed >= multiple * weight(pending) / 2:
                for _ in range(multiple):
                    batch.append(pending)
                    owed -= weight(pending)
                    pending = next(draw)
            mixed.append(batch)
        return mixed

    if length is None:
        new_weight = sum(weight(i) for i in order)
        length = mixed_length(len(order), new_weight, mean_replay_weight, ratio, batch_size, drop_last)
    most = max(length * batch_size - len(order), 0)
    groups = interleave(order, draw, weight, mean_replay_weight, ratio, epoch, most)
    slots = [index for group in groups for index in group]
    if drop_last:
        slots += [next(draw) for _ in range(length * batch_size - len(slots))]
        return plan_batches(slots, batch_size, drop_last)[:length]
    return [slots[start:end] for start, end in cuts(len(slots), length, batch_size)]


def interleave(
    order: Sequence[int],
    draw: Iterator[int],
    weight: Callable[[int], int],
    mean_replay_weight: float,
    ratio: float,
    epoch: int = 0,
    most: int | None = None,
) -> Iterator[list[int]]:
    """Each new sample with the replayed ones that follow it, by error diffusion.

    Args:
        order: the new samples of this epoch, by index.
        draw: an endless stream of replayed samples, by index.
        weight: loss-bearing tokens of a sample, or 1 where there are no tokens.
        mean_replay_weight: mean of `weight` over what `draw` can give.
        ratio: the share of the replayed samples in the weight, in ``[0, 1)``.
        epoch: how many epochs of this task came before.
        most: the most replayed samples; as many as are due, by default.
    """
    odds = ratio / (1.0 - ratio)
    new_weights = [weight(i) for i in order]
    owed = _owed(sum(new_weights), mean_replay_weight, ratio, epoch)
    pending = next(draw)
    count = 0
    for index, new_weight in zip(order, new_weights, strict=True):
        group = [index]
        owed += odds * new_weight
        while (most is None or count < most) and owed >= weight(pending) / 2:
            group.append(pending)
            owed -= weight(pending)
            count, pending = count + 1, next(draw)
        yield group


def _owed(new_weight: float, mean_replay_weight: float, ratio: float, epoch: int) -> float:
    """Weight of replayed samples still to come. Error diffusion over the earlier epochs left about this much."""
    expected = ratio / (1.0 - ratio) * new_weight / mean_replay_weight  # replayed samples per epoch, a real number
    return (epoch * expected - math.floor(epoch * expected + 0.5)) * mean_replay_weight


def cuts(slots: int, length: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Where an epoch of so many samples is cut into `length` batches.

    All are full but the last. Where that would be small, the last two share what is left: replayed samples must not
    leave a batch with a single sample, which batch norm cannot train on.
    """
    length = min(length, slots)
    ends = [min(batch_size * (i + 1), slots) for i in range(length)]
    if slots <= batch_size * (length - 1):
        ends = [slots * (i + 1) // length for i in range(length)]  # fewer than this many batches hold: evenly
    elif length > 1 and slots - ends[-2] < batch_size / 2:
        begin = ends[-3] if length > 2 else 0
        ends[-2] = begin + math.ceil((slots - begin) / 2)
    return zip([0, *ends[:-1]], ends, strict=True)


def balanced_order(order: Sequence[T], weight: Callable[[T], float], pending: int = 32) -> list[T]:
    """An order of the same items in which every stretch has nearly their mean weight.

    Of some pending items the one comes next that brings the sum nearest to what so many items weigh on average. So the
    number of replayed samples in an epoch hardly depends on whether long or short ones are drawn. What fits badly comes
    late: start at a random place of the cycle, and every item is as likely as any other.
    """
    weights = [weight(i) for i in order]
    mean = sum(weights) / max(len(weights), 1)
    if len(set(weights)) < 2:
        return list(order)
    result, waiting, surplus = [], list(range(min(pending, len(order)))), 0.0
    following = iter(range(len(waiting), len(order)))
    while waiting:
        # The longest waiting first among equals.
        best = min(waiting, key=lambda position: abs(surplus + weights[position] - mean))
        waiting.remove(best)
        waiting += [position for position in [next(following, None)] if position is not None]
        result.append(order[best])
        surplus += weights[best] - mean
    return result


def mixed_length(
    samples: int, new_weight: float, mean_replay_weight: float, ratio: float, batch_size: int, drop_last: bool = False
) -> int:
    """The number of batches of an epoch in ``replace`` mode, the same for every epoch."""
    expected = ratio / (1.0 - ratio) * new_weight / mean_replay_weight
    if drop_last:
        return (samples + math.floor(expected)) // batch_size
    return math.ceil((samples + math.ceil(expected)) / batch_size)


def share_of_rank(batch: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This process's part of a global batch; the last batch wraps around so that all parts are of equal size.

    Taking every ``world_size``-th sample makes the union over all ranks the batch that one process would see.
    """
    size = math.ceil(len(batch) / world_size)
    return [batch[(rank + i * world_size) % len(batch)] for i in range(size)]


def seed_of(*parts: int) -> int:
    """One seed from several numbers, without the collisions of a sum."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = (seed ^ (part + 0x9E3779B9)) * 0xBF58476D1CE4E5B9 % 2**64
        seed ^= seed >> 31
    return seed % 2**63
