"""The loader of text streams: it tokenises while it reads, and resumes by reading up to the same position again."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_cl.data.batch_source import TaskBatches, TaskLength, no_counts
from lightning_cl.data.mixing.contents import Kinds, Trained
from lightning_cl.data.mixing.plan import share_of_rank
from lightning_cl.data.mixing.replayed import Mix, loss_tokens
from lightning_cl.data.mixing.stream_mix import Item, StreamMix

Sample = dict[str, Tensor]


class StreamLoader(TaskBatches):
    """Batches from a stream of token samples without length or index.

    An epoch is one pass over the stream. All ranks read it, and each takes its share of every batch, so that together
    they see the batches that one process would see. A resume reads the stream from its beginning to the old position.
    Replayed samples are mixed in one by one (:class:`~lightning_cl.data.mixing.stream_mix.StreamMix`) before packing,
    so new and replayed documents share blocks.

    Lightning fetches one batch ahead from a loader without length. So the coordinator calls :meth:`begin` for each
    batch that is trained on. No method here is called ``state_dict``, since Lightning would save a later position.

    Args:
        samples: a function that begins a pass over the stream; it gets the number of the epoch.
        batch_size: samples in a batch on one rank; with packing, blocks.
        collate_fn: joins samples, or lists of samples, to a batch.
        block_length: pack samples into blocks of at most this many tokens, in the order of the stream.
        rank: number of this process.
        world_size: number of processes.
    """

    is_stream = True

    def __init__(
        self,
        samples: Callable[[int], Iterator[Sample]],
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        *,
        block_length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._samples, self.batch_size, self.collate_fn = samples, batch_size, collate_fn
        self.block_length, self.rank, self.world_size = block_length, rank, world_size
        self.counts = no_counts()
        self._mix = StreamMix(samples)
        self._open: list[list[Item]] = []  # blocks that are being filled
        self._closed: list[list[Item]] = []  # full blocks, not yet in a batch
        # For each source, its replayed weight minus its share, in the blocks given out.
        self._surplus: list[float] = []
        self._given = 0  # batches of this task that were put together
        self._waiting: deque[_Given] = deque()  # batches fetched but not yet trained on
        self._latest: deque[_Given] = deque(maxlen=2)  # the latest batches that training has begun with
        self._position = 0  # the number of the last of these
        self._goal: dict[str, Any] | None = None
        self._on_resumed: Callable[[], None] | None = None

    @override
    def mix_in(self, mix: Mix, length: TaskLength | None = None) -> None:
        if mix.mode == "add":
            raise ValueError("mode='add': a stream's batches keep their size; expected 'replace'")
        known = (length or TaskLength()).known_batches
        if not mix.curve.is_constant and math.isinf(known):
            raise ValueError("ratio: a share that changes over a stream needs to know its length; set max_steps")
        self._mix = StreamMix(self._samples, [*self._mix.mixes, mix], None if math.isinf(known) else known)

    def apart(self) -> StreamLoader:
        """A new loader over the same stream, from its beginning and without packing, for extra passes."""
        own = {"rank": self.rank, "world_size": self.world_size}
        # It gets a copy of the stream, so that its left-out records are not counted here.
        return StreamLoader(copy.copy(self._samples), self.batch_size, self.collate_fn, **own)

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch != self._mix.epoch:
            self._start(epoch)

    def _start(self, epoch: int) -> None:
        self._mix.begin(epoch)
        self._open, self._closed, self._surplus = [], [], []
        self._latest.clear()
        self._position = 0

    def __iter__(self) -> Iterator[Any]:
        goal, self._goal = self._goal, None
        pending: list[list[list[Item]]] = []
        if goal is not None and goal["epoch"] == self._mix.epoch:
            pending = self._continue(goal)
        else:
            self._start(self._mix.epoch)
        begun = self._position
        batches: Iterator[list[list[Item]]] = chain(pending, self._batches())
        first = next(batches, None)
        if first is None and begun > 0:  # the old position was the end of a pass, so the next pass begins
            self._start(self._mix.epoch + 1)
            batches = self._batches()
            first = next(batches, None)
        on_resumed, self._on_resumed = self._on_resumed, None
        if on_resumed is not None:
            on_resumed()
        if first is None:
            raise ValueError(f"{self._samples}: there is no token to predict in it")
        self._waiting.clear()
        number = self._position
        for everywhere in chain([first], batches):
            number += 1
            own = share_of_rank(everywhere, self.rank, self.world_size)
            self._waiting.append(_Given(number, _size(own), [[item.part for item in row] for row in own], everywhere))
            packed = self.block_length is not None
            yield self.collate_fn([[item.sample for item in row] if packed else row[0].sample for row in own])

    @override
    def begin(self) -> tuple[Kinds | None, Trained | None]:
        if not self._waiting:
            return None, None
        given = self._waiting.popleft()
        self._latest.append(given)
        self._position = given.number
        for name, count in given.size.items():
            self.counts[name] += count
        new = [item.sample for row in given.rows for item in row if not item.part.replayed]
        return (given.kinds if self._mix.mixes else None), Trained(self._mix.epoch, given.number, new)

    @override
    def position(self, in_flight: int = 0) -> dict[str, Any]:
        # The position includes the batches that were fetched but not yet trained on. Their replayed samples were drawn
        # from the buffer as it was at that time.
        counts = dict(self.counts)
        begun = list(self._latest)
        untrained = begun[len(begun) - in_flight :]
        for given in untrained:
            for name, count in given.size.items():
                counts[name] -= count
        pending = [
            [[self._mix.remember(item) for item in row] for row in given.rows] for given in [*untrained, *self._waiting]
        ]
        position = max(self._position - in_flight, 0)
        return {"epoch": self._mix.epoch, "counts": counts, "position": position, "pending": pending, **self._here()}

    @override
    def resume_from(self, position: dict[str, Any], on_resumed: Callable[[], None] | None = None) -> None:
        self._goal, self._on_resumed = position, on_resumed
        self._mix.epoch, self._position = position["epoch"], position["position"]
        self.counts = dict(position["counts"])
        self._latest.clear()

    def _continue(self, goal: dict[str, Any]) -> list[list[list[Item]]]:
        """Restores a :meth:`position`, and returns the batches that were already put together."""
        self._mix.go_to(goal["epoch"], goal["mix"])
        self._open, self._closed = (self._recalled(goal[name]) for name in ("open", "closed"))
        self._surplus = list(goal["surplus"])
        self._given, self._position = goal["given"], goal["position"]
        self._latest.clear()
        pending = [self._recalled(rows) for rows in goal["pending"]]
        return [rows for rows in pending if rows]

    def _recalled(self, blocks: list[list[dict[str, Any]]]) -> list[list[Item]]:
        recalled = [[self._mix.recall(item) for item in block] for block in blocks]
        there = [[item for item in block if item is not None] for block in recalled]
        return [block for block in there if block]

    def _here(self) -> dict[str, Any]:
        """Returns the position after the last batch that was put together."""
        opened, closed = (
            [[self._mix.remember(item) for item in block] for block in blocks] for blocks in (self._open, self._closed)
        )
        blocks = {"open": opened, "closed": closed, "surplus": list(self._surplus)}
        return {"given": self._given, "mix": self._mix.position(), **blocks}

    def _batches(self) -> Iterator[list[list[Item]]]:
        """Puts together the batches of all ranks."""
        items = self._mix.items(lambda: self._given)
        rows = ([item] for item in items) if self.block_length is None else self._blocks(items, self.block_length)
        size = self.batch_size * self.world_size
        while batch := list(islice(rows, size)):
            self._given += 1
            yield batch

    def _blocks(self, items: Iterator[Item], length: int) -> Iterator[list[Item]]:
        """Packs samples by first fit into a few open blocks; closes a block that is nearly full, or the oldest.

        Several closed blocks wait. The next one given out is the one that keeps the running replayed share nearest to
        its goal, since a block may contain replayed documents only.
        """
        opened, closed = self._open, self._closed
        for item in items:
            size = len(item.sample["input_ids"])
            fitting = next((block for block in opened if _used(block) + size <= length), None)
            if fitting is None:
                opened.append([item])
            else:
                fitting.append(item)
            full = next((i for i, block in enumerate(opened) if _used(block) >= 0.98 * length), None)
            if full is not None or len(opened) > _OPEN_BLOCKS:
                closed.append(opened.pop(full or 0))
            if len(closed) > (_CLOSED_BLOCKS if self._mix.mixes else 0):
                yield self._best_closed()
        closed += opened
        opened.clear()
        while closed:
            yield self._best_closed()

    def _best_closed(self) -> list[Item]:
        surplus = [self._mix.surplus(block, self._given) for block in self._closed]
        totals = self._surplus or [0.0] * len(surplus[0])

        def deviation(index: int) -> float:
            return max((abs(total + x) for total, x in zip(totals, surplus[index], strict=True)), default=0.0)

        best = min(range(len(surplus)), key=deviation)
        self._surplus = [total + x for total, x in zip(totals, surplus[best], strict=True)]
        return self._closed.pop(best)


class _Given(NamedTuple):
    """A batch that was given out.

    Attributes:
        number: its number in this pass, from 1.
        size: its samples and loss-bearing tokens on this rank, as in the loader's counts.
        kinds: the parts of its rows on this rank.
        rows: its rows on all ranks.
    """

    number: int
    size: dict[str, int]
    kinds: Kinds
    rows: list[list[Item]]


def _used(block: Sequence[Item]) -> int:
    return sum(len(item.sample["input_ids"]) for item in block)


def _size(rows: Sequence[Sequence[Item]]) -> dict[str, int]:
    """Counts the samples of a batch, and its tokens that bear loss."""
    counts = no_counts()
    for item in chain.from_iterable(rows):
        kind = "replayed" if item.part.replayed else "new"
        counts[f"{kind}_samples"] += 1
        counts[f"{kind}_tokens"] += loss_tokens(item.sample) or 0
    return counts


_OPEN_BLOCKS = 8  # blocks that are filled at the same time
_CLOSED_BLOCKS = 24  # blocks that wait until they are given out
