"""The common interface of this package's loaders: content of the batches, position, and mixed-in samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from lightning_cl.data.mixing.contents import Kinds, Trained
from lightning_cl.data.mixing.replayed import Mix


class TaskLength(NamedTuple):
    """Length of a task, as far as it is known before its first batch."""

    epochs: float = 1.0
    """The most epochs; infinite if only the number of steps ends the task."""
    batches: float | None = None
    """The most batches in all epochs together; None if only the number of epochs ends the task."""
    limit: int | float = 1.0
    """Number of batches of an epoch that are trained on, or their share, as ``limit_train_batches``."""

    @property
    def known_batches(self) -> float:
        """The most batches that can be computed without the length of the data; else infinite."""
        by_epochs = self.limit * self.epochs if isinstance(self.limit, int) else math.inf
        return min(by_epochs, math.inf if self.batches is None else self.batches)


class TaskBatches(ABC):
    """Batches of one task that report their content, can resume at any position, and accept replayed samples.

    The run's coordinator and the methods use a loader by this interface alone, for data with an index and for streams.
    Lightning uses it as a training loader: it iterates, and calls :meth:`set_epoch`.

    Attributes:
        batch_size: samples in a batch on one rank; with packing, blocks.
        collate_fn: joins samples, or lists of samples, to a batch.
        block_length: the most tokens of a packed row; None without packing.
        rank: number of this process.
        world_size: number of processes.
        counts: samples and loss-bearing tokens that were given out in this task, new and replayed.
    """

    batch_sampler = None  # Lightning looks for it next to `sampler`

    is_stream: ClassVar[bool]
    """True if the data has no length and no index; Lightning then fetches one batch ahead."""

    batch_size: int
    collate_fn: Callable[[list[Any]], Any]
    block_length: int | None
    rank: int
    world_size: int
    counts: dict[str, int]

    @property
    def sampler(self) -> TaskBatches:
        """The loader itself: Lightning calls ``set_epoch`` on a loader's sampler."""
        return self

    @property
    def num_workers(self) -> int:
        """Worker processes that load samples."""
        return 0

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch; Lightning calls it before each epoch."""

    @abstractmethod
    def mix_in(self, mix: Mix, length: TaskLength | None = None) -> None:
        """Mixes the samples of a buffer into the batches from now on, in addition to those of other buffers.

        Args:
            mix: the buffer, and its share of the batches.
            length: length of the task; needed if the share changes over the task. None: one epoch.

        Raises:
            ValueError: if all shares together leave no room for new samples, or the mix does not fit this loader.
        """

    @abstractmethod
    def begin(self) -> tuple[Kinds | None, Trained | None]:
        """Takes note that training begins with the next of the batches given out.

        Returns:
            the batch's replayed parts (None if nothing is replayed), and the new samples of all ranks.
        """

    @abstractmethod
    def position(self, in_flight: int = 0) -> dict[str, Any]:
        """Returns the position after the last batch that was trained on, and the counts of this task up to there.

        Args:
            in_flight: number of the latest batches that have not been trained on.
        """

    @abstractmethod
    def resume_from(self, position: dict[str, Any], on_resumed: Callable[[], None] | None = None) -> None:
        """Lets the next iterator resume from a :meth:`position`.

        Args:
            position: the result of :meth:`position`.
            on_resumed: called when the epoch is planned again, before its first sample is fetched. Random states are
                to be restored then, since the planning may have drawn from them.
        """


def is_stream(loader: Any) -> bool:
    """Tells if a loader is one of this package's, for data without length and index."""
    return isinstance(loader, TaskBatches) and loader.is_stream


def is_indexed(loader: Any) -> bool:
    """Tells if a loader is one of this package's, for data with length and index."""
    return isinstance(loader, TaskBatches) and not loader.is_stream


def no_counts() -> dict[str, int]:
    """Returns the counts of a loader that has given out nothing yet."""
    return {"new_samples": 0, "replayed_samples": 0, "new_tokens": 0, "replayed_tokens": 0}
