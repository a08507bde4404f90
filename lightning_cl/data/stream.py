"""Streams of text: tokenised as they come, batched or packed, resumable by reading on to the same place."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor

from lightning_cl.data.mixing import share_of_rank
from lightning_cl.data.replayed import loss_tokens

Sample = dict[str, Tensor]


class StreamLoader:
    """Batches from a stream of token samples without length or index.

    An epoch is one pass over the stream. All ranks read it, and each takes its share of every batch, so that together
    they see the batches that one process would see. A resume reads the stream from its beginning to the place where it
    stood. Replay cannot mix into a stream.

    Lightning fetches one batch ahead from a loader without length. So the coordinator says by :meth:`begin` which
    batches are trained on, and nothing here is called ``state_dict``: Lightning would save and restore the wrong place.

    Args:
        samples: begins a pass over the stream; gets the number of the epoch.
        batch_size: samples, or with packing blocks, in a batch on one rank.
        collate_fn: joins samples, or lists of samples, to a batch.
        block_length: pack samples into blocks of at most so many tokens, in the order in which they come.
        rank: this process.
        world_size: number of processes.
    """

    batch_sampler = None  # Lightning looks for it beside `sampler`

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
        self.counts = {"new_samples": 0, "replayed_samples": 0, "new_tokens": 0, "replayed_tokens": 0}
        self._epoch = self._begun = 0
        self._given: deque[tuple[int, int]] = deque()  # samples and tokens of batches that nobody has begun with
        self._latest: deque[tuple[int, int]] = deque(maxlen=2)  # of those begun with last
        self._goal: dict[str, Any] | None = None

    @property
    def sampler(self) -> StreamLoader:
        """Lightning calls ``set_epoch`` on a loader's sampler: here, the loader itself."""
        return self

    def apart(self) -> StreamLoader:
        """Another one over the same stream, from its beginning and without packing, for extra passes."""
        own = {"rank": self.rank, "world_size": self.world_size}
        # A copy: what is left out there is not counted here.
        return StreamLoader(copy.copy(self._samples), self.batch_size, self.collate_fn, **own)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self._epoch:
            self._begun = 0
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        goal, self._goal = self._goal, None
        start = goal["position"] if goal is not None and goal["epoch"] == self._epoch else 0
        batches = self._batches()
        for _ in islice(batches, start):
            pass
        first = next(batches, None)
        if first is None and start > 0:  # it stood at the end of a pass: the next one follows
            self._epoch, start = self._epoch + 1, 0
            batches = self._batches()
            first = next(batches, None)
        if first is None:
            raise ValueError(f"{self._samples}: there is no token to predict in it")
        self._begun = start
        self._given.clear()
        for rows in chain([first], batches):
            own = share_of_rank(rows, self.rank, self.world_size)
            self._given.append(_size(own))
            yield self.collate_fn(own)

    def begin(self) -> None:
        """The next batch of those given out is being trained on."""
        self._begun += 1
        if self._given:
            size = self._given.popleft()
            self._latest.append(size)
            self._add(size, 1)

    def _add(self, size: tuple[int, int], sign: int) -> None:
        for name, count in zip(("new_samples", "new_tokens"), size, strict=True):
            self.counts[name] += sign * count

    def place(self, in_flight: int = 0) -> dict[str, Any]:
        """Where the loader stands, and what was trained on in this task.

        Args:
            in_flight: how many of the batches that were begun with last have not been trained on.
        """
        counts = dict(self.counts)
        for samples, tokens in list(self._latest)[len(self._latest) - in_flight :]:
            counts["new_samples"] -= samples
            counts["new_tokens"] -= tokens
        return {"epoch": self._epoch, "position": max(self._begun - in_flight, 0), "counts": counts}

    def go_to(self, place: dict[str, Any]) -> None:
        """The next iterator goes on from a :meth:`place`."""
        self._goal, self._epoch, self._begun = place, place["epoch"], place["position"]
        self.counts = dict(place["counts"])

    def _batches(self) -> Iterator[list[Any]]:
        rows = self._samples(self._epoch) if self.block_length is None else self._blocks(self.block_length)
        size = self.batch_size * self.world_size
        while batch := list(islice(rows, size)):
            yield batch

    def _blocks(self, length: int) -> Iterator[list[Sample]]:
        """First fit over a few open blocks; one that is nearly full, or the oldest, is closed."""
        opened: list[tuple[int, list[Sample]]] = []
        for sample in self._samples(self._epoch):
            size = len(sample["input_ids"])
            place = next((i for i, (used, _) in enumerate(opened) if used + size <= length), None)
            if place is None:
                opened.append((size, [sample]))
            else:
                used, block = opened[place]
                opened[place] = (used + size, [*block, sample])
            full = next((i for i, (used, _) in enumerate(opened) if used >= 0.98 * length), None)
            if full is not None or len(opened) > _OPEN:
                yield opened.pop(full or 0)[1]
        yield from (block for _, block in opened)


def _size(rows: Sequence[Any]) -> tuple[int, int]:
    """Samples, and tokens that bear loss, of a batch."""
    samples = [sample for row in rows for sample in (row if isinstance(row, list) else [row])]
    return len(samples), sum(loss_tokens(sample) or 0 for sample in samples)


_OPEN = 8  # blocks that are filled at the same time
