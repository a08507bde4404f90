"""A task of the sequence, and the position in it that every callback reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_cl.arguments import is_integer, is_number

_LONGEST_NAME = 150  # in bytes; file systems take 255, and checkpoints add to it


@dataclass
class Task:
    """One task: a name, its data, and what differs from the Trainer's and the DataModule's settings.

    Args:
        name: unique in the sequence; it names columns, files and log entries.
        train: what to train on: a ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder of source
            files or a glob (``src/**/*.py``, one document a file), a folder of train, valid and test files, the name of
            a data set on the hub (``owner/name`` or ``owner/name:config``), ``sample:prose``, ``sample:chat``,
            ``sample:python`` or ``sample:cpp`` (text that every machine has), a list of texts or records, a
            ``datasets.Dataset``, ``DatasetDict`` or ``IterableDataset``, any torch ``Dataset``, a ``DataLoader``, or a
            ``LightningDataModule``. ``None``: the task is watched and never trained on.
        val: the same for validation. ``None``: what comes with `train` (a folder's validation file), or else a share of
            the text is held out (``val_fraction`` of :class:`~lightning_cl.TaskDataModule`); a stream, and data that is
            no text, is not split. The matrix column of other data is then measured on the training set, and says so.
        test: the same for ``lightning-cl test``.
        max_epochs: passes over this task's data. A task that sets ``max_epochs`` or ``max_steps`` is bounded by what it
            sets and no longer by the Trainer's limits.
        max_steps: optimizer steps on this task.
        batch_size: samples in a batch of this task.
        columns: names of the data's own columns or keys for ours, as ``{prompt: Question, completion: Answer}``.
        field: the key under which a ``.json`` file has its list of records; dots for keys in keys, as ``data.train``.
        lr: peak learning rate of this task: all parameter groups are scaled so that the first one starts from it.

    Raises:
        ValueError: if a value is out of its range.
    """

    name: str
    train: Any = None
    val: Any = None
    test: Any = None
    max_epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    columns: dict[str, str] | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"Task(name={self.name!r}): a task needs a name, a non-empty string")
        if len(self.slug.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"Task(name={self.name[:40] + '…'!r}): a name of {len(self.name)} characters; files are named after it:"
                f" give one of at most {_LONGEST_NAME} bytes"
            )
        for argument in ("max_epochs", "max_steps", "batch_size"):
            value = getattr(self, argument)
            if value is not None and not is_integer(value, 1):
                raise ValueError(f"Task({self.name!r}, {argument}={value!r}): expected a positive integer or None")
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"Task({self.name!r}, lr={self.lr!r}): expected a positive, finite number or None")
        if self.train is None and self.val is None:
            raise ValueError(
                f"Task({self.name!r}): nothing to train on and nothing to watch: give `train`, or `val` alone for a"
                " task that is only watched"
            )

    @property
    def watched(self) -> bool:
        """True if the task is only evaluated, never trained on."""
        return self.train is None

    @property
    def slug(self) -> str:
        """The name as a part of a file name."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip("._") or "task"


@dataclass(frozen=True)
class TaskPosition:
    """Position of a run in its sequence: callbacks read it as ``self.task``.

    Args:
        index: how many tasks were trained before this one.
        name: the task's name.
        count: how many tasks are to be trained in all, as far as is known.
    """

    index: int
    name: str
    count: int

    def __str__(self) -> str:
        return f"task {self.index + 1}/{self.count} {self.name!r}"

    @property
    def title(self) -> str:
        """The same, as the beginning of a line."""
        return f"T{str(self)[1:]}"
