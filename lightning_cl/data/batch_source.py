"""Interface of the loaders of this package: what the batches hold, the position in them, and what is mixed in."""

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
    """At most so many; infinite where only steps end the task."""
    batches: float | None = None
    """At most so many in all; None where only the epochs end the task."""
    limit: int | float = 1.0
    """Batches of an epoch that are trained on, or their share, as ``limit_train_batches``."""

    @property
    def known_batches(self) -> float:
        """The number of batches as far as it follows without the length of the data; else infinite."""
        by_epochs = self.limit * self.epochs if isinstance(self.limit, int) else math.inf
        return min(by_epochs, math.inf if self.batches is None else self.batches)


class TaskBatches(ABC):
    """Batches of one task that tell what they hold, resume at any position, and take replayed samples in.

    The run's coordinator and the methods know a loader by this interface alone, whether its data has an index or is a
    stream. Lightning takes it as a training loader: it iterates, and calls :meth:`set_epoch`.

    Attributes:
        batch_size: samples, or with packing blocks, in a batch on one rank.
        collate_fn: joins samples, or lists of samples, to a batch.
        block_length: the most tokens of a packed row; None without packing.
        rank: this process.
        world_size: number of processes.
        counts: samples and loss-bearing tokens that were given out in this task, new and replayed.
    """

    batch_sampler = None  # Lightning looks for it next to `sampler`

    is_stream: ClassVar[bool]
    """True if there is no length and no index; Lightning then fetches one batch ahead."""

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
        """Sets the number of the epoch; Lightning does so before each one."""

    @abstractmethod
    def mix_in(self, mix: Mix, length: TaskLength | None = None) -> None:
        """Lets the samples of a buffer take part in the batches from now on, next to those of other buffers.

        Args:
            mix: what, and how much of it.
            length: of the task; needed for a share that changes over it. None: one epoch.

        Raises:
            ValueError: if there is no room for it next to what is mixed in already, or it does not fit this loader.
        """

    @abstractmethod
    def begin(self) -> tuple[Kinds | None, Trained | None]:
        """Tells that the next batch of those given out is about to be trained on.

        Returns:
            its replayed parts (None where nothing is replayed), and the new samples of all ranks.
        """

    @abstractmethod
    def position(self, in_flight: int = 0) -> dict[str, Any]:
        """Returns the position after the last batch that was trained on, and what was given out in this task.

        Args:
            in_flight: how many of the latest batches have not been trained on.
        """

    @abstractmethod
    def resume_from(self, position: dict[str, Any], on_resumed: Callable[[], None] | None = None) -> None:
        """Lets the next iterator resume from a :meth:`position`.

        Args:
            position: of :meth:`position`.
            on_resumed: called when the order of the epoch is laid out again, before its first sample is fetched: the
                moment to restore random states, since the order may have drawn from them.
        """


def is_stream(loader: Any) -> bool:
    """Tells if a loader is one of this package over data without length and index."""
    return isinstance(loader, TaskBatches) and loader.is_stream


def is_indexed(loader: Any) -> bool:
    """Tells if a loader is one of this package over data with length and index."""
    return isinstance(loader, TaskBatches) and not loader.is_stream


def no_counts() -> dict[str, int]:
    """Returns the counts of a loader that has given out nothing yet."""
    return {"new_samples": 0, "replayed_samples": 0, "new_tokens": 0, "replayed_tokens": 0}
