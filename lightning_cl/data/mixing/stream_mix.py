"""A stream of new samples with replayed ones between them, and where in it one stands."""

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
    """A sample on its way into a batch, and what it is."""

    sample: Any
    part: Part


class StreamMix:
    """The samples of one pass over a stream, and replayed ones between them, by error diffusion.

    A replayed sample comes next whenever that brings the running share of the loss-bearing tokens nearer to its goal.
    It is drawn at that moment, from the buffer as it is: one that fills while it trains is replayed as it fills. What
    is drawn depends on how many were drawn before and on the seed alone; so where one stands is a few numbers.

    Args:
        samples: begins a pass over the stream; gets the number of the epoch.
        mixes: what is replayed.
        batches: of the whole task; for shares that change over it.
    """

    def __init__(
        self, samples: Callable[[int], Iterator[Any]], mixes: Sequence[Mix] = (), batches: float | None = None
    ) -> None:
        self._samples, self.mixes, self._batches = samples, list(mixes), batches
        check_sum([mix.curve for mix in self.mixes])
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Goes to the beginning of a pass."""
        self.epoch, self._taken = epoch, 0
        self._owed = [0.0] * len(self.mixes)
        self._drawn = [0] * len(self.mixes)
        self._slots = [0] * len(self.mixes)  # in the buffer, when the sample that is waited for was drawn
        # Where tasks have shares: what each of them is behind its own.
        self._behind: list[dict[str, float]] = [{} for _ in self.mixes]

    def place(self) -> dict[str, Any]:
        """Returns the position of the mix."""
        behind = [dict(tasks) for tasks in self._behind]
        return {
            "taken": self._taken,
            "owed": list(self._owed),
            "drawn": list(self._drawn),
            "slots": list(self._slots),
            "behind": behind,
        }

    def go_to(self, epoch: int, place: dict[str, Any]) -> None:
        """Goes on from a :meth:`place`."""
        self.begin(epoch)
        self._taken = place["taken"]
        # A mix that was added since begins with nothing.
        for number, parts in enumerate(
            zip(place["owed"], place["drawn"], place["slots"], place["behind"], strict=True)
        ):
            if number < len(self.mixes):
                self._owed[number], self._drawn[number], self._slots[number] = parts[:3]
                self._behind[number] = dict(parts[3])

    def items(self, batches_done: Callable[[], int]) -> Iterator[Item]:
        """The samples from here on.

        Args:
            batches_done: how many batches of the task were given out so far.
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
        """Returns the surplus of each buffer in a block over its share, in weight."""
        shares: dict[int, float] = {}
        for mix in self.mixes:  # two may replay one buffer
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
        for place, odds in enumerate(odds_at(curves, progress)):
            if len(self.mixes[place].buffer) > 0:  # an empty one owes nothing
                self._owed[place] += odds * (1 if weight is None else weight)

    def _due(self) -> Item | None:
        for place, mix in enumerate(self.mixes):
            if self._owed[place] <= 0 or len(mix.buffer) == 0:
                continue
            shares = shares_of_tasks(mix)
            behind = self._behind[place]
            # The larger share first among equals, which all are at the beginning.
            task = max(shares, key=lambda name: (behind.get(name, 0.0), shares[name]), default=None)
            # One draw until it is paid: drawn anew while the buffer fills, short samples would be due first.
            self._slots[place] = self._slots[place] or mix.buffer.slots
            number = mix.buffer.pick(seed_of(mix.seed, self.epoch, self._drawn[place]), task, self._slots[place])
            if number is None:
                self._slots[place] = 0
                continue
            info = mix.buffer.info(number)
            weight = max(info.loss_tokens, 1) if info.loss_tokens >= 0 else 1
            if self._owed[place] >= weight / 2:
                self._drawn[place] += 1
                self._slots[place] = 0
                self._owed[place] -= weight
                counted = 1 if mix.draw == "proportional" else weight
                for name, share in shares.items():
                    behind[name] = behind.get(name, 0.0) + counted * (share - (name == task))
                return Item(mix.buffer.get(number), Part(True, info.length or None, mix.buffer, number))
        return None

    def remember(self, item: Item) -> dict[str, Any]:
        """An item for a checkpoint: one on disk as its number, so that it can still be removed."""
        if not item.part.replayed:
            return {"sample": item.sample, "part": None}
        place = next(i for i, mix in enumerate(self.mixes) if mix.buffer is item.part.owner)
        on_disk = not isinstance(self.mixes[place].buffer.store, MemoryStore)
        return {"sample": None if on_disk else item.sample, "part": [place, item.part.number]}

    def recall(self, state: dict[str, Any]) -> Item | None:
        """The item of :meth:`remember`; None if it was removed since."""
        if state["part"] is None:
            return Item(state["sample"], Part(False, _length(state["sample"])))
        place, number = state["part"]
        buffer = self.mixes[place].buffer
        try:
            sample = buffer.get(number) if state["sample"] is None else state["sample"]
        except RemovedError:
            return None
        return Item(sample, Part(True, _length(sample), buffer, number))


def shares_of_tasks(mix: Mix) -> dict[str, float]:
    """Returns each task's share of the replayed weight (``proportional``: samples); empty for equal draws."""
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
