"""A task of the sequence, and the position in it that every callback reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_cl.arguments import is_integer, is_number

_LONGEST_NAME = 150  # in bytes; file systems take 255, and checkpoints add to it

METRICS = (
    "exact_match",
    "normalized_match",
    "accuracy",
    "acc",
    "acc_norm",
    "rouge_l",
    "edit_similarity",
    "sari",
)
"""The names of the metrics that answers to a task's prompts can be scored with."""


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
        metrics: what :class:`~lightning_cl.TaskMatrix` also measures on this task, with a matrix for each. Scores of
            answers that the model writes: ``exact_match``, ``normalized_match`` (without case and punctuation),
            ``accuracy`` (the label that the answer begins with), ``rouge_l``, ``edit_similarity``, ``sari``. Scores by
            the log-likelihood of given choices: ``acc``, ``acc_norm`` (per character). The first one is the task's main
            metric. All are between 0 and 1, and higher is better (:mod:`lightning_cl.functional.text_scores`).
        choices: the possible answers, for all records that have no ``choices`` of their own.
        max_new_tokens: the most tokens of an answer that the model writes; default: 8 more than the longest
            reference has.

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
    metrics: list[str] | None = None
    choices: list[str] | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"Task(name={self.name!r}): a task needs a name, a non-empty string")
        if len(self.slug.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"Task(name={self.name[:40] + '…'!r}): a name of {len(self.name)} characters; files are named after it:"
                f" give one of at most {_LONGEST_NAME} bytes"
            )
        for argument in ("max_epochs", "max_steps", "batch_size", "max_new_tokens"):
            value = getattr(self, argument)
            if value is not None and not is_integer(value, 1):
                raise ValueError(f"Task({self.name!r}, {argument}={value!r}): expected a positive integer or None")
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"Task({self.name!r}, lr={self.lr!r}): expected a positive, finite number or None")
        self._check_metrics()
        if self.train is None and self.val is None:
            raise ValueError(
                f"Task({self.name!r}): nothing to train on and nothing to watch: give `train`, or `val` alone for a"
                " task that is only watched"
            )

    def _check_metrics(self) -> None:
        if self.metrics is not None:
            if isinstance(self.metrics, str):
                self.metrics = [self.metrics]
            self.metrics = list(self.metrics)
            wrong = [name for name in self.metrics if name not in METRICS]
            if wrong or not self.metrics:
                named = repr(wrong[0]) if wrong else "an empty list"
                raise ValueError(f"Task({self.name!r}, metrics=…): got {named}; expected some of {list(METRICS)}")
            if len(set(self.metrics)) < len(self.metrics):
                raise ValueError(f"Task({self.name!r}, metrics={self.metrics}): a metric is named twice")
        if self.choices is not None:
            texts = not isinstance(self.choices, str) and all(isinstance(one, str) and one for one in self.choices)
            if not texts or len(set(self.choices)) < 2 or len(set(self.choices)) < len(self.choices):
                raise ValueError(
                    f"Task({self.name!r}, choices={self.choices!r}): expected a list of at least two different texts"
                )
            self.choices = list(self.choices)

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
