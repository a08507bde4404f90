"""A choice of a task's samples for extra passes: one at a time, or in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_cl.arguments import check_integer
from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.data.stream import StreamLoader
from lightning_cl.passes.passes import progress, to_device

_MOST_SAMPLES = 256


class TaskSamples:
    """This rank's share of `count` samples of a task, on the device.

    The choice is the same for all ranks, and together they visit the samples that one process would visit. A sample has
    a number, which does not depend on the number of ranks or the size of batches.

    Args:
        trainer: the Trainer inside ``fit``, with its training data set up.
        count: number of samples on all ranks; if the task has fewer, all of them.
        seed: seed of the choice.
        label: text of the progress display.
        loader: the loader that has the samples; default: the current task's training loader.
        batch_size: samples in a batch; default: that of the loader. If the lengths of samples are known, a batch has at
            most as many tokens as `batch_size` of the longest samples.
        first: the number of the first sample; those before it are left out.
        quiet: show no progress, and let no signal interrupt the pass.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        count: int,
        seed: int,
        label: str,
        loader: Any = None,
        batch_size: int | None = None,
        first: int = 0,
        quiet: bool = False,
    ) -> None:
        self.trainer, self.count, self.label = trainer, count, label
        self.loader: Any = trainer.train_dataloader if loader is None else loader
        self.batch_size, self._quiet = batch_size, quiet
        self.is_stream = why_not_plannable(self.loader) is not None
        self._chosen: list[tuple[int, int]] = []
        self._first: list[tuple[int, int]] = []
        if not self.is_stream:
            indices = task_indices(self.loader)
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
            everywhere = [(number, indices[position]) for number, position in enumerate(order[:count])][first:]
            self._first = everywhere[:1]
            self._chosen = everywhere[trainer.global_rank :: trainer.world_size]

    def count_samples(self) -> int:
        """Returns the number of samples on this rank."""
        return self.count if self.is_stream else len(self._chosen)

    def count_batches(self) -> int:
        """Returns the number of batches that :meth:`batches` gives on this rank; for a stream, the most."""
        return -(-self.count // self._rows()) if self.is_stream else sum(1 for _ in self._groups(True))

    def singles(self) -> Iterator[tuple[int, Any]]:
        """Gives each sample's number, and the sample as a batch of one."""
        if self.is_stream:
            share = -(-self.count // self.trainer.world_size)
            samples = ((numbers[0], batch) for numbers, batch in self._stream(share, 1))
            for number, batch in self._shown(samples, self.label, share):
                yield number, to_device(self.trainer, batch)
            return
        for number, index in self._shown(self._chosen, self.label, len(self._chosen)):
            yield number, self._batch([index])

    def batches(self, like_length: bool = True) -> Iterator[tuple[list[int], Any]]:
        """Gives the numbers of each batch's samples, and the batch.

        Args:
            like_length: put samples of similar length together if lengths are known, for less padding.
        """
        if self.is_stream:
            share = -(-self.count // self.trainer.world_size)
            for numbers, batch in self._shown(self._stream(share, self._rows()), self.label):
                yield numbers, to_device(self.trainer, batch)
            return
        groups = list(self._groups(like_length))
        for group in self._shown(groups, self.label, len(groups)):
            yield [number for number, _ in group], self._batch([index for _, index in group])

    def one(self) -> Any:
        """A batch of one sample on every rank, whatever the rank's share; None if there is no sample."""
        if self.is_stream:
            first = next(self._stream(1, 1), None)
            return None if first is None else to_device(self.trainer, first[1])
        return self._batch([self._first[0][1]]) if self._first else None

    def probe(self, count: int) -> tuple[list[int], Any, list[Any]] | None:
        """A few samples of different lengths, as a batch and one by one; None if there are no samples.

        Returns:
            their numbers, the batch, and the batches of one.
        """
        if self.is_stream:
            first = next(self._stream(count, count), None)
            if first is None:
                return None
            numbers, batch = first
            batch = to_device(self.trainer, batch)
            return numbers, batch, [rows_of(batch, slice(row, row + 1)) for row in range(len(numbers))]
        ordered = [item for group in self._groups(True) for item in group]
        if not ordered:
            return None
        positions = sorted({round(i * (len(ordered) - 1) / max(count - 1, 1)) for i in range(count)})
        picked = [ordered[position] for position in positions]
        indices = [index for _, index in picked]
        return [number for number, _ in picked], self._batch(indices), [self._batch([index]) for index in indices]

    def _shown(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        return iter(items) if self._quiet else progress(self.trainer, items, label, total)

    def _rows(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        size = getattr(self.loader, "batch_size", None)
        return size if isinstance(size, int) else 8

    def _groups(self, like_length: bool) -> Iterator[list[tuple[int, int]]]:
        length_of = getattr(self.loader.dataset, "length", None)
        rows = self._rows()
        if length_of is None or not like_length:
            yield from (self._chosen[start : start + rows] for start in range(0, len(self._chosen), rows))
            return
        lengths = {index: length_of(index) for _, index in self._chosen}
        longest = getattr(self.loader, "block_length", None)
        # Samples of equal length stay in the order of their numbers.
        items = sorted(self._chosen)
        for group in groups_of_like_length([lengths[index] for _, index in items], rows, longest):
            yield [items[position] for position in group]

    def _batch(self, indices: Sequence[int]) -> Any:
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        return to_device(self.trainer, collate([dataset[index] for index in indices]))

    def _stream(self, share: int, most: int) -> Iterator[tuple[list[int], Any]]:
        """Gives the first samples of this rank's part of a stream, which are read apart from training."""
        loader = self.loader.apart() if isinstance(self.loader, StreamLoader) else self.loader
        number = 0
        for batch in loader:
            size = _batch_size(batch)
            for start in range(0, size, most):
                rows = min(most, size - start, share - number)
                if rows <= 0:
                    return
                numbers = [(number + row) * self.trainer.world_size + self.trainer.global_rank for row in range(rows)]
                yield numbers, rows_of(batch, slice(start, start + rows))
                number += rows


def groups_of_like_length(
    lengths: Sequence[int], rows: int, longest: int | None = None, most: int = _MOST_SAMPLES
) -> Iterator[list[int]]:
    """Groups positions of samples into batches of at most as many tokens as `rows` of the longest, from short to long.

    Args:
        lengths: tokens of each sample.
        rows: number of samples in a batch of the longest samples.
        longest: tokens of a longest row; by default, of the longest sample.
        most: the most samples in a batch.
    """
    longest = longest or max(lengths, default=1)
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda position: lengths[position]):
        if group and ((len(group) + 1) * lengths[position] > rows * longest or len(group) == most):
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def check_samples(samples: int, batch_size: int | None) -> None:
    """Checks a number of samples and a batch size.

    Raises:
        ValueError: if one is not a positive integer; the message names the argument.
    """
    check_integer("samples", samples, 1)
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)


def single_samples(
    trainer: L.Trainer, count: int, seed: int, label: str, loader: Any = None
) -> Iterator[tuple[int, Any]]:
    """This rank's share of `count` samples, each as a batch of one (:class:`TaskSamples`)."""
    return TaskSamples(trainer, count, seed, label, loader).singles()


def _batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    return next(len(value) for value in values if isinstance(value, Tensor))


def rows_of(batch: Any, rows: slice) -> Any:
    """Some rows of all tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: rows_of(value, rows) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(rows_of(value, rows) for value in batch)
    return batch
