"""A stream of new samples with replayed samples between them, and the position in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from lightning_cl.buffers import MemoryStore
from lightning_cl.buffers.disk.segment import RemovedError
from lightning_cl.data.mixing.contents import Part
from lightning_cl.data.mixing.plan import seed_of
from lightning_cl.data.mixing.ratio import check_sum, odds_at
from lightning_cl.data.mixing.replayed import Mix, loss_tokens


class Item(NamedTuple):
    """A sample that will go into a batch, and its origin."""

    sample: Any
    part: Part


class StreamMix:
    """The samples of one pass over a stream, with replayed samples between them by error diffusion.

    A replayed sample comes next whenever that brings the running share of the loss-bearing tokens nearer to its goal.
    It is drawn at that moment from the current content of the buffer, which may still grow during the task. The draw
    depends only on the seed and on the number of earlier draws, so a few numbers describe the position.

    Args:
        samples: a function that begins a pass over the stream; it gets the number of the epoch.
        mixes: the buffers to replay from, with their shares.
        batches: number of batches in the whole task; needed if a share changes over the task.
    """

    def __init__(
        self, samples: Callable[[int], Iterator[Any]], mixes: Sequence[Mix] = (), batches: float | None = None
    ) -> None:
        self._samples, self.mixes, self._batches = samples, list(mixes), batches
        check_sum([mix.curve for mix in self.mixes])
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Moves to the beginning of a pass."""
        self.epoch, self._taken = epoch, 0
        self._owed = [0.0] * len(self.mixes)
        self._drawn = [0] * len(self.mixes)
        self._slots = [0] * len(self.mixes)  # slots of the buffer when the sample that is due next was drawn
        # If tasks have shares: the weight that each task lacks to reach its share.
        self._lacking: list[dict[str, float]] = [{} for _ in self.mixes]

    def position(self) -> dict[str, Any]:
        """Returns the position in the pass, for a checkpoint."""
        lacking = [dict(tasks) for tasks in self._lacking]
        return {
            "taken": self._taken,
            "owed": list(self._owed),
            "drawn": list(self._drawn),
            "slots": list(self._slots),
            "behind": lacking,
        }

    def go_to(self, epoch: int, position: dict[str, Any]) -> None:
        """Resumes from a :meth:`position`."""
        self.begin(epoch)
        self._taken = position["taken"]
        # A mix that was added since then begins with zeros.
        for number, parts in enumerate(
            zip(position["owed"], position["drawn"], position["slots"], position["behind"], strict=True)
        ):
            if number < len(self.mixes):
                self._owed[number], self._drawn[number], self._slots[number] = parts[:3]
                self._lacking[number] = dict(parts[3])

    def items(self, batches_done: Callable[[], int]) -> Iterator[Item]:
        """The samples from the present position on.

        Args:
            batches_done: a function that gives the number of the task's batches given out so far.
        """
        stream = islice(self._samples(self.epoch), self._taken, None)
        while True:
            due = self._due()
            if due is not None:
                yield due
                continue
            sample = next(stream, None)
            if sample is None:
                return
            self._taken += 1
            self._owe(sample, batches_done())
            yield Item(sample, Part(False, _length(sample)))

    def surplus(self, block: Sequence[Item], batches_done: int) -> list[float]:
        """Returns for each buffer the weight of its samples in a block minus its share of the block's weight."""
        shares: dict[int, float] = {}
        for mix in self.mixes:  # two mixes may replay the same buffer
            share = mix.curve.at(self._progress(batches_done))
            shares[id(mix.buffer)] = shares.get(id(mix.buffer), 0.0) + share
        weights, total = dict.fromkeys(shares, 0), 0
        for item in block:
            weight = loss_tokens(item.sample) or 0
            total += weight
            if item.part.replayed:
                weights[id(item.part.owner)] += weight
        return [weights[buffer] - share * total for buffer, share in shares.items()]

    def _progress(self, batches_done: int) -> float:
        return min(batches_done / self._batches, 1.0) if self._batches else 0.0

    def _owe(self, sample: Any, batches_done: int) -> None:
        progress = self._progress(batches_done)
        curves = [mix.curve for mix in self.mixes]
        weight = loss_tokens(sample)
        for number, odds in enumerate(odds_at(curves, progress)):
            if len(self.mixes[number].buffer) > 0:  # an empty buffer owes nothing
                self._owed[number] += odds * (1 if weight is None else weight)

    def _due(self) -> Item | None:
        for i, mix in enumerate(self.mixes):
            if self._owed[i] <= 0 or len(mix.buffer) == 0:
                continue
            shares = shares_of_tasks(mix)
            lacking = self._lacking[i]
            # Among equals, as all are at the beginning, the task with the larger share comes first.
            task = max(shares, key=lambda name: (lacking.get(name, 0.0), shares[name]), default=None)
            # The drawn sample stays the same until it is due. New draws from a growing buffer would favour short
            # samples, since these are due earlier.
            self._slots[i] = self._slots[i] or mix.buffer.slots
            number = mix.buffer.pick(seed_of(mix.seed, self.epoch, self._drawn[i]), task, self._slots[i])
            if number is None:
                self._slots[i] = 0
                continue
            info = mix.buffer.info(number)
            weight = max(info.loss_tokens, 1) if info.loss_tokens >= 0 else 1
            if self._owed[i] >= weight / 2:
                self._drawn[i] += 1
                self._slots[i] = 0
                self._owed[i] -= weight
                counted = 1 if mix.draw == "proportional" else weight
                for name, share in shares.items():
                    lacking[name] = lacking.get(name, 0.0) + counted * (share - (name == task))
                return Item(mix.buffer.get(number), Part(True, info.length or None, mix.buffer, number))
        return None

    def remember(self, item: Item) -> dict[str, Any]:
        """An item for a checkpoint; a sample on disk is saved as its number, so that it can still be removed."""
        if not item.part.replayed:
            return {"sample": item.sample, "part": None}
        source = next(i for i, mix in enumerate(self.mixes) if mix.buffer is item.part.owner)
        on_disk = not isinstance(self.mixes[source].buffer.store, MemoryStore)
        return {"sample": None if on_disk else item.sample, "part": [source, item.part.number]}

    def recall(self, state: dict[str, Any]) -> Item | None:
        """The item that :meth:`remember` saved; None if its sample was removed since."""
        if state["part"] is None:
            return Item(state["sample"], Part(False, _length(state["sample"])))
        source, number = state["part"]
        buffer = self.mixes[source].buffer
        try:
            sample = buffer.get(number) if state["sample"] is None else state["sample"]
        except RemovedError:
            return None
        return Item(sample, Part(True, _length(sample), buffer, number))


def shares_of_tasks(mix: Mix) -> dict[str, float]:
    """Returns each task's share of the replayed weight (``proportional``: of samples); empty if all are drawn alike."""
    if mix.draw == "uniform":
        return {}
    buffer = mix.buffer
    counts = buffer.counts()
    names = [name for name in buffer.task_names if name in counts]
    if len(names) < 2:
        return {}
    if mix.draw == "task":
        sizes = [1.0] * len(names)
    elif mix.draw == "recency":
        sizes = [2.0**age for age in range(len(names))]
    else:
        sizes = [float(buffer.seen_of[name]) for name in names]
    return {name: size / sum(sizes) for name, size in zip(names, sizes, strict=True)}


def _length(sample: Any) -> int | None:
    return len(sample["input_ids"]) if loss_tokens(sample) is not None else None
