"""The samples of one task by index, first the new ones and then the replayed ones, with their weights and draws."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch.utils.data import Dataset

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.disk.segment import RemovedError
from lightning_cl.buffers.store import Store
from lightning_cl.buffers.tokens import loss_tokens as loss_tokens
from lightning_cl.data.mixing.drawing import Draw, Group, draws_of, groups_of
from lightning_cl.data.mixing.plan import MixMode, Source, Span, seed_of
from lightning_cl.data.mixing.ratio import Curve, check_sum


class Chooser(Protocol):
    """The part of :class:`~lightning_cl.callbacks.replay.interference.Interference` that a loader uses."""

    def attach(self, samples: Samples, number: int, /) -> None:
        """Takes note of a loader's samples, and of the number of the mix that has the buffer's samples."""

    def choose(self, samples: Samples, index: int, most_tokens: int | None) -> int:
        """Returns the index of the sample to replay instead of a planned one."""


@dataclass
class Mix:
    """Samples that are mixed into a task's batches.

    Args:
        buffer: the samples of earlier tasks.
        curve: their share of the loss-bearing tokens over the task; without tokens, their share of the samples.
        mode: ``replace`` keeps the batch size, ``add`` makes batches larger.
        seed: seed of the draws.
        draw: the kind of draw (:mod:`~lightning_cl.data.mixing.drawing`).
        chooser: replaces planned samples by others when their batch is put together.
    """

    buffer: ReplayBuffer
    curve: Curve
    mode: MixMode
    seed: int
    draw: Draw = "uniform"
    chooser: Chooser | None = None

    @classmethod
    def constant(cls, buffer: ReplayBuffer, ratio: float, mode: MixMode = "replace", seed: int = 0) -> Mix:
        """A mix whose share is the same from beginning to end of the task."""
        return cls(buffer, Curve.constant(ratio), mode, seed)


class NewThenReplayed(Dataset[Any]):
    """A data set of new samples, with the replayed ones after them; a tuple of indices gives the samples of a block.

    A replayed sample may have been removed since the epoch was planned. Then it is left out of its block. If it would
    fill a row alone, the next replayed sample that still exists replaces it, or else a new one.
    """

    def __init__(self, new: Any, parts: Sequence[tuple[ReplayBuffer, Sequence[int]]]) -> None:
        self.new, self.size = new, len(new)
        # Worker processes only read samples, so they get the stores and not the whole buffers.
        self.parts = [(buffer.store, numbers) for buffer, numbers in parts]

    def __getitem__(self, index: int | tuple[int, ...]) -> Any:
        if isinstance(index, tuple):
            found = [self._sample(i, others=False) for i in index]
            kept = [sample for sample in found if sample is not None]
            return kept or [self.new[index[0] % self.size]]
        sample = self._sample(index, others=True)
        return self.new[index % self.size] if sample is None else sample

    def _sample(self, index: int, others: bool) -> Any:
        if index < self.size:
            return self.new[index]
        position = index - self.size
        for store, numbers in self.parts:
            if position < len(numbers):
                for number in existing(store, numbers, position, others):
                    try:
                        return store.get(number)
                    except RemovedError:
                        continue  # another process has just removed it
                return None
            position -= len(numbers)
        raise IndexError(index)


def existing(store: Store, numbers: Sequence[int], position: int, others: bool = True) -> Iterator[int]:
    """Gives the record at a position if it was not removed; with `others`, then all records after it, cyclically."""
    for i in range(len(numbers) if others else 1):
        number = numbers[(position + i) % len(numbers)]
        if not store.is_erased(number):
            yield number


class Samples:
    """New and replayed samples by index, and the draws of the replayed ones.

    Args:
        new: the task's data set, map-style.
        mixes: the buffers that are mixed in, with their shares.

    Attributes:
        epochs: length of the task in epochs; needed if a share changes over the task.
        shown: the share of each epoch that is trained on.
        parts: for each mix its buffer, and the numbers of the records that were in it when the task began.
        weights: loss-bearing tokens of all samples; None if shares are of samples, not of tokens.
    """

    def __init__(self, new: Any, mixes: Sequence[Mix] = ()) -> None:
        self.new, self.mixes = new, list(mixes)
        self.epochs, self.shown = 1.0, 1.0
        self.parts = [(mix.buffer, array("q", mix.buffer.held)) for mix in self.mixes]
        self._ends = [len(new)]
        for _, numbers in self.parts:
            self._ends.append(self._ends[-1] + len(numbers))
        self._columns = [buffer.columns(numbers) for buffer, numbers in self.parts]
        self.weights = self._weights() if self.mixes else None
        for number, mix in enumerate(self.mixes):
            if mix.chooser is not None:
                mix.chooser.attach(self, number)
        check_sum([mix.curve for mix in self.mixes])
        modes = sorted({mix.mode for mix in self.mixes})
        if len(modes) > 1:
            raise ValueError(f"mode: the callbacks that replay want {modes}; give all of them the same")

    def _weights(self) -> array[int] | None:
        # Shares are of tokens if new and replayed samples have tokens, else of samples.
        loss = [columns["loss_tokens"] for columns in self._columns]
        if any(len(part) == 0 or min(part) < 0 or max(part) == 0 for part in loss) or len(self.new) == 0:
            return None
        count_of = getattr(self.new, "loss_tokens", None)
        if count_of is None and loss_tokens(self.new[0]) is not None:

            def count_of(index: int) -> int:
                return loss_tokens(self.new[index]) or 0

        if count_of is None:
            return None
        weights = array("i", (count_of(i) for i in range(len(self.new))))
        for part in loss:
            weights.extend(part)
        return weights

    def record_of(self, index: int, others: bool = True) -> tuple[ReplayBuffer, int] | None:
        """The buffer and the record's number of a replayed sample; None for a new one.

        Args:
            index: index of the sample.
            others: True: a record that was removed is replaced by another (:class:`NewThenReplayed`).
        """
        if index < len(self.new):
            return None
        source = bisect_right(self._ends, index) - 1
        buffer, numbers = self.parts[source]
        number = next(existing(buffer.store, numbers, index - self._ends[source], others), None)
        return None if number is None else (buffer, number)

    @property
    def starts(self) -> list[int]:
        """The index of each mix's first sample."""
        return self._ends[:-1]

    @property
    def end(self) -> int:
        """The number of all samples, new and replayed."""
        return self._ends[-1]

    def source_of(self, index: int) -> int:
        """0 for a new sample, and the number of its mix, from 1, for a replayed one."""
        return bisect_right(self._ends, index)

    @property
    def chooses(self) -> bool:
        """Returns True if a mix has a chooser, which decides just before a batch is fetched."""
        return any(mix.chooser is not None for mix in self.mixes)

    def chosen(self, row: Any) -> Any:
        """A planned row in which the choosers of mixes may have replaced replayed samples by others."""
        if isinstance(row, tuple):
            return tuple(self._chosen(index, packed=True) for index in row)
        return self._chosen(row, packed=False)

    def _chosen(self, index: int, packed: bool) -> int:
        if index < len(self.new):
            return index
        chooser = self.mixes[bisect_right(self._ends, index) - 1].chooser
        if chooser is None:
            return index
        return chooser.choose(self, index, self.lengths[index] if packed and self.lengths is not None else None)

    @property
    def mode(self) -> MixMode:
        """The common mode of all mixes."""
        return self.mixes[0].mode if self.mixes else "replace"

    @property
    def is_constant(self) -> bool:
        """Returns True if no share changes over the task."""
        return all(mix.curve.is_constant for mix in self.mixes)

    def span(self, epoch: int) -> Span:
        """The part of the task that an epoch is."""
        return Span(epoch, self.epochs, self.shown)

    @property
    def replays(self) -> bool:
        """Returns True if anything is mixed in."""
        return bool(self.mixes)

    @property
    def counts_tokens(self) -> bool:
        """Returns True if the loss-bearing tokens of the new samples are known."""
        return hasattr(self.new, "loss_tokens") or self.weights is not None

    def weight(self, index: int) -> int:
        """Loss-bearing tokens of a sample; 1 if shares are of samples."""
        return 1 if self.weights is None else self.weights[index]

    def mean_weight(self, indices: Sequence[int]) -> float:
        """The mean of :meth:`weight`, above 0."""
        if self.weights is None:
            return 1.0
        return max(sum(self.weights[i] for i in indices) / max(len(indices), 1), 1e-9)

    def tokens(self, index: int) -> int:
        """Loss-bearing tokens of a sample, also if shares are of samples; needs :attr:`counts_tokens`."""
        if self.weights is not None:
            return self.weights[index]
        if index < len(self.new):
            result: int = self.new.loss_tokens(index)
            return result
        source = bisect_right(self._ends, index) - 1
        return max(self._columns[source]["loss_tokens"][index - self._ends[source]], 0)

    @cached_property
    def lengths_of_new(self) -> list[int]:
        """Tokens of each new sample; needs a data set with ``length``."""
        return [self.new.length(i) for i in range(len(self.new))]

    @cached_property
    def lengths(self) -> array[int] | None:
        """Tokens of each sample; None if the data set has no ``length``, or if a replayed sample has no tokens."""
        if not hasattr(self.new, "length"):
            return None
        lengths = array("i", self.lengths_of_new)
        for columns in self._columns:
            if len(columns["length"]) and min(columns["length"]) == 0:
                return None
            lengths.extend(columns["length"])
        return lengths

    def sources(self, epoch: int, balance_tokens: bool = False) -> list[Source]:
        """The sources of replayed samples, one for each mix; their indices follow those of the new samples.

        Args:
            epoch: number of the epoch in this task.
            balance_tokens: False: any consecutive draws have nearly the mean number of loss-bearing tokens. True: they
                have nearly the mean ratio of all tokens to loss-bearing tokens.
        """
        found = []
        for number, mix in enumerate(self.mixes):
            groups = self._groups(number)
            balance: Callable[[int], float] = self.weight
            if balance_tokens and self.lengths is not None:
                lengths = self.lengths
                members = [index for group in groups for index in group.members]
                ratio = sum(lengths[i] for i in members) / max(sum(self.weight(i) for i in members), 1)

                def balance(index: int, lengths: Any = lengths, ratio: float = ratio) -> float:
                    result: float = round(lengths[index] - ratio * self.weight(index), 6)
                    return result

            draw = draws_of(groups, self.weight, balance, seed_of(mix.seed, epoch))
            rate = sum(group.share / self.mean_weight(group.members) for group in groups)
            found.append(Source(draw, 1.0 / rate, mix.curve))
        return found

    def _groups(self, number: int) -> list[Group]:
        """Returns the groups that a mix draws from, each with its share of the weight."""
        mix, start = self.mixes[number], self._ends[number]
        tasks = self._columns[number]["task"]
        return groups_of(mix.draw, mix.buffer, tasks, start, lambda members: self.mean_weight(members) * len(members))
