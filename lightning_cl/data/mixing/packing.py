"""The order within an epoch that needs little padding: by blocks of fixed length, or batches of similar length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from typing import Any

import torch

from lightning_cl.data.mixing.plan import Source, Span, interleave

Block = tuple[int, ...]
"""Samples that share a row of a batch, by index."""

WINDOW = 256  # blocks of tokens that are packed together; larger windows hardly reduce the padding


def windows_of(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cuts an order of samples into windows of about `tokens` tokens."""
    windows: list[list[int]] = []
    filled = tokens
    for index in order:
        if filled >= tokens:
            windows.append([])
            filled = 0
        windows[-1].append(index)
        filled += lengths[index]
    return windows


def pack(windows: Iterable[Sequence[int]], lengths: Sequence[int], block_length: int) -> list[Block]:
    """Packs each window of samples into blocks, by best-fit decreasing.

    The longest sample comes first and goes into the block where it leaves the least room (Johnson et al. 1974: at most
    11/9 of the fewest possible blocks, plus one). Samples keep their order inside a block and from block to block.
    Because of the windows, a shuffled order stays random and the time is O(n log n).

    Args:
        windows: indices of samples; an index may come twice.
        lengths: tokens of each sample.
        block_length: the most tokens in a block; no sample may be longer.
    """
    return list(chain.from_iterable(_best_fit(window, lengths, block_length) for window in windows))


def _best_fit(window: Sequence[int], lengths: Sequence[int], block_length: int) -> list[Block]:
    blocks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # for each block the room left in it and its number; sorted
    for position in sorted(range(len(window)), key=lambda position: -lengths[window[position]]):
        length = lengths[window[position]]
        fitting = bisect_left(rooms, (length, 0))
        if fitting == len(rooms):
            room, number = block_length, len(blocks)
            blocks.append([])
        else:
            room, number = rooms.pop(fitting)
        blocks[number].append(position)
        if room > length:
            insort(rooms, (room - length, number))
    return [tuple(window[position] for position in block) for block in sorted(sorted(block) for block in blocks)]


def pack_mixed(
    windows: Sequence[Sequence[int]],
    sources: Sequence[Source],
    weight: Callable[[int], int],
    lengths: Sequence[int],
    block_length: int,
    span: Span = Span(),  # noqa: B008
    least: int = 0,
    most: int | None = None,
) -> list[Block]:
    """One epoch of blocks in which each source's samples carry its share of the total weight.

    Replayed samples are interleaved with new ones by error diffusion
    (:func:`~lightning_cl.data.mixing.plan.interleave`), and both are packed together.

    Args:
        windows: indices of the new samples, as :func:`windows_of` cuts them.
        sources: the sources of replayed samples.
        weight: loss-bearing tokens of a sample, or 1 where there are no tokens.
        lengths: tokens of each sample.
        block_length: the most tokens in a block.
        span: the part of the task that this epoch is.
        least: the fewest blocks of the result; if there are fewer, blocks are split.
        most: the most blocks of the result, not fewer than the new samples need alone; if there are more, the last
            replayed samples are left out.
    """
    stream = interleave(list(chain(*windows)), sources, weight, span)
    groups = [list(islice(stream, len(window))) for window in windows]
    while True:
        blocks = pack([list(chain(*window)) for window in groups], lengths, block_length)
        excess = 0 if most is None else (len(blocks) - most) * block_length
        if excess <= 0 or not _leave_out(groups, lengths, excess):
            return _split_largest(blocks, least, sources[0].draw)


def _leave_out(groups: Sequence[Sequence[list[int]]], lengths: Sequence[int], tokens: int) -> bool:
    """Removes the last replayed samples, `tokens` tokens of them; returns False if there were none left."""
    found = False
    for group in reversed(list(chain(*groups))):
        while tokens > 0 and len(group) > 1:  # the first of a group is the new sample
            tokens -= lengths[group.pop()]
            found = True
    return found


def _split_largest(blocks: list[Block], least: int, draw: Iterator[int]) -> list[Block]:
    """Splits the largest blocks until there are `least`; adds replayed samples if all blocks are single samples."""
    if len(blocks) >= least:
        return blocks
    queue = [(-len(block), position, block) for position, block in enumerate(blocks)]
    heapify(queue)
    while len(queue) < least:
        size, position, block = heappop(queue)
        parts = [block[::2], block[1::2]] if size < -1 else [block, (next(draw),)]
        for part, at in zip(parts, (position, len(queue) + 1 + len(blocks)), strict=True):
            heappush(queue, (-len(part), at, part))
    return [block for _, _, block in sorted(queue, key=lambda entry: entry[1])]


def evenly(blocks: Sequence[Block], surplus: Callable[[Block], float], ahead: int = 16) -> list[Block]:
    """An order of the same blocks in which `surplus` is spread evenly.

    While the running sum of deviations from the mean is above zero, a block below the mean comes next, and the other
    way round. So the sum never exceeds the largest deviation. Among the next `ahead` blocks of that kind, the best
    fitting one is taken; apart from that the order is kept.

    Args:
        blocks: the blocks, in any order.
        surplus: the value of a block that is to be spread.
        ahead: number of blocks of a kind that are compared.
    """
    values = [surplus(block) for block in blocks]
    mean = sum(values) / max(len(values), 1)
    queues: tuple[deque[tuple[float, Block]], ...] = (deque(), deque())
    for value, block in zip(values, blocks, strict=True):
        queues[value > mean].append((value - mean, block))
    below, above = queues
    result, total = [], 0.0
    while below or above:
        queue = above if above and (total <= 0 or not below) else below
        best = min(range(min(ahead, len(queue))), key=lambda i: abs(total + queue[i][0]))
        total += queue[best][0]
        result.append(queue[best][1])
        del queue[best]
    return result


def evenly_all(blocks: Sequence[Block], surplus: Callable[[Block], Sequence[float]], ahead: int = 64) -> list[Block]:
    """An order as that of :func:`evenly`, for several values that are to be spread at once.

    Among the next `ahead` blocks, the one comes next for which the largest of the running sums is smallest.

    Args:
        blocks: the blocks, in any order.
        surplus: the values of a block that are to be spread.
        ahead: number of blocks that are compared.
    """
    values = [surplus(block) for block in blocks]
    width = len(values[0]) if values else 0
    means = [sum(value[i] for value in values) / len(values) for i in range(width)]
    waiting = deque(
        (block, [x - mean for x, mean in zip(value, means, strict=True)])
        for block, value in zip(blocks, values, strict=True)
    )
    totals, result = [0.0] * width, []
    while waiting:
        looked_at = range(min(ahead, len(waiting)))
        best = min(looked_at, key=lambda i: max(abs(t + x) for t, x in zip(totals, waiting[i][1], strict=True)))
        block, value = waiting[best]
        del waiting[best]
        totals = [total + x for total, x in zip(totals, value, strict=True)]
        result.append(block)
    return result


def fill(batches: Iterable[Sequence[Any]], lengths: Sequence[int], block_length: int | None = None) -> float:
    """The share of the positions in padded batches that have a token; the rest is padding.

    Args:
        batches: the rows of each batch. A row is the index of a sample, or a tuple of indices that share the row.
        lengths: tokens of each sample.
        block_length: positions in a row; by default, as many as the longest row of the batch needs.

    Returns:
        a share in ``(0, 1]``; 1 if there are no batches.
    """
    tokens = positions = 0
    for batch in batches:
        rows = [sum(lengths[i] for i in row) if isinstance(row, tuple) else lengths[row] for row in batch]
        tokens += sum(rows)
        positions += len(rows) * (max(rows) if block_length is None else block_length)
    return tokens / positions if positions else 1.0


BUCKETED_BATCHES = 64  # batches that are sorted together; this avoids 95 % and more of the padding


def bucketed_order(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int, window: int = BUCKETED_BATCHES
) -> list[int]:
    """An order of the same samples in which those of one batch have similar length.

    The order is cut into windows of some batches. Within a window, samples are sorted by length and cut into batches.
    Then all batches are shuffled. The last samples of `order` that do not fill a batch stay at the end. So long samples
    are not put last, or dropped, more often than others.

    Args:
        order: indices of samples, shuffled.
        lengths: tokens of each sample.
        batch_size: samples in a batch (over all ranks).
        seed: seed of the order of the batches.
        window: batches in a window.
    """
    full = len(order) - len(order) % batch_size
    batches: list[list[int]] = []
    for start in range(0, full, window * batch_size):
        by_length = sorted(order[start : min(start + window * batch_size, full)], key=lambda index: lengths[index])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return [index for i in shuffled for index in batches[i]] + list(order[full:])
