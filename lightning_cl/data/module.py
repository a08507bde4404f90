"""The DataModule of a sequence of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.data import records
from lightning_cl.data.loader import TaskLoader
from lightning_cl.data.plannable import why_not_plannable
from lightning_cl.data.tokenizer import TrainedBPE, fingerprint, load_tokenizer
from lightning_cl.data.tokens import TokenCollator, TokenDataset, split_documents, tokenize
from lightning_cl.tasks import Task


@dataclass
class _Prepared:
    """A task's data when it can be trained on: data sets, or loaders and DataModules of other people's making."""

    train: Any
    val: Any
    test: Any
    held_out: bool = False  # whether `val` was split off `train`


class TaskDataModule(L.LightningDataModule):
    """The data of a sequence of tasks; :func:`~lightning_cl.fit_tasks` leads the Trainer through it.

    Text is tokenised into blocks of `max_length` tokens. A torch ``Dataset``, a ``DataLoader`` and a
    ``LightningDataModule`` are used as they are.

    Args:
        tasks: what to learn, in order: ``{name: data}``, as in ``{mails: mails.jsonl, notes: notes.txt}``, or a list of
            ``Task``. In the dictionary,
            data is what ``Task.train`` takes, or a dictionary of ``Task``'s arguments.
        tokenizer: for tasks that are text: the name of a tokenizer on the hub, a folder, a ``transformers`` tokenizer,
            or :class:`~lightning_cl.data.TrainedBPE` for a vocabulary of our own.
        max_length: tokens in a block of text.
        batch_size: samples in a batch, per device.
        num_workers: worker processes that load samples; 0 loads in the main process.
        seed: seed of the order of the samples and of the validation split.
        collate_fn: joins samples of torch data sets to a batch; default: torch's.
        val_fraction: share of a text task that is held out where the task has no `val`; whole documents, the same ones
            in every run.

    Attributes:
        index: which of the trained tasks is the current one. (``tasks`` becomes a list of ``Task``, and ``tokenizer``,
            once the data is set up, the tokenizer itself.)

    Raises:
        ValueError: for arguments out of range, two tasks of one name, or no task to train on.
    """

    def __init__(
        self,
        tasks: dict[str, Any] | list[Any],
        tokenizer: str | TrainedBPE | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        val_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        self.tasks = as_tasks(tasks)
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
        if not (isinstance(val_fraction, (int, float)) and math.isfinite(val_fraction) and 0 < val_fraction < 1):
            raise ValueError(f"val_fraction={val_fraction!r}: expected a share between 0 and 1")
        self.tokenizer: Any = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.seed, self.collate_fn, self.val_fraction = seed, collate_fn, val_fraction
        self.index = 0
        self.watch: int | None = None
        self.driven = False
        self.expected_fingerprint: str | None = None
        self._prepared: dict[str, _Prepared] | None = None
        self._set_up: set[tuple[int, str]] = set()
        self._loader: TaskLoader | None = None
        self._loader_task: str | None = None
        self.check()

    # ------------------------------------------------------------------ the sequence

    @property
    def trained_tasks(self) -> list[Task]:
        """The tasks to train on, in order; the others are only watched."""
        return [task for task in self.tasks if not task.watched]

    @property
    def current(self) -> Task:
        """The task that ``train_dataloader`` gives."""
        return self.trained_tasks[self.index]

    def check(self) -> None:
        """Finds what is wrong with tasks and files before anything is built.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is empty or of an unknown kind, or if text has no tokenizer.
            TypeError: if a task's data is none of the known kinds.
        """
        for task in self.tasks:
            for role in ("train", "val", "test"):
                source = getattr(task, role)
                records.check_text_source(source, task.name, role)
                if records.is_text_source(source):
                    if self.tokenizer is None:
                        raise ValueError(
                            f"task {task.name!r}, {role}: text needs a tokenizer: give TaskDataModule(tokenizer=…), the"
                            " name of one on the hub, a folder, or TrainedBPE(vocab_size=…)"
                        )
                elif source is not None and not _is_data(source):
                    raise TypeError(
                        f"task {task.name!r}, {role}: expected a path, texts, a datasets.Dataset with a `text` column,"
                        f" a torch Dataset, a DataLoader or a LightningDataModule, got {_describe(source)}"
                    )

    def fingerprint(self) -> str | None:
        """A hash of the tokenizer: a model must not go on with another vocabulary than it was trained with."""
        return fingerprint(self.tokenizer) if hasattr(self.tokenizer, "get_vocab") else None

    @property
    def is_set_up(self) -> bool:
        """Whether the data has been read: ``tokenizer`` is then a tokenizer."""
        return self._prepared is not None

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare_data(self) -> None:
        """Trains the vocabulary, if there is one to train, and lets the tasks' own DataModules prepare theirs."""
        if isinstance(self.tokenizer, TrainedBPE):
            self.tokenizer.train(self._vocabulary_texts(self.tokenizer))
        for module in self._data_modules():
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all tasks, once."""
        # After fit_tasks the Trainer still holds this module; a fit on other data is not our business.
        trains = self.trainer is None or self.trainer.fit_loop._data_source.instance is self
        if stage == "fit" and not self.driven and trains and len(self.trained_tasks) > 1:
            raise RuntimeError(
                f"trainer.fit would train only one of these {len(self.trained_tasks)} tasks and look finished: use"
                " lightning_cl.fit_tasks(trainer, module, data), which trains them one after another"
            )
        for module in self._data_modules():
            module.trainer = self.trainer
            # Training data is looked at before the first fit: `fit` first, each stage once.
            for needed in ("fit", stage or "fit"):
                if (id(module), needed) not in self._set_up:
                    self._set_up.add((id(module), needed))
                    module.setup(needed)
        if self._prepared is not None:
            return
        if isinstance(self.tokenizer, TrainedBPE):
            self.tokenizer = self.tokenizer.train(self._vocabulary_texts(self.tokenizer))
        elif isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.expected_fingerprint not in (None, self.fingerprint()):
            raise ValueError(
                "tokenizer: it is not the one that the checkpoint was trained with; the model would read every text as"
                " noise. Give the same tokenizer, and for TrainedBPE the same first task"
            )
        self._prepared = {task.name: self._prepare(task) for task in self.tasks}

    def train_dataloader(self) -> Any:
        """The current task's batches."""
        loader = self.train_loader(self.current)
        if isinstance(loader, TaskLoader) and self._loader is not None and self._loader_task == self.current.name:
            loader.counts = self._loader.counts  # reload_dataloaders_every_n_epochs: one task, one count
        self._loader, self._loader_task = loader if isinstance(loader, TaskLoader) else None, self.current.name
        return loader

    def val_dataloader(self) -> Any:
        """Validation batches of the current task; of the watched one while the matrix is measured."""
        task = self.current if self.watch is None else self.tasks[self.watch]
        loader = self.val_loader(task)
        return [] if loader is None else loader

    def test_dataloader(self) -> Any:
        """Test batches of the task that is evaluated."""
        task = self.current if self.watch is None else self.tasks[self.watch]
        test = self._data(task).test
        if test is None and self.has_test_data(task):
            test = task.train
        return [] if test is None else self._loader_of(test, task, shuffle=False)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Handed on to the task's own DataModule, if it is one."""
        return self._delegate("on_before_batch_transfer", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Handed on to the task's own DataModule, if it is one."""
        return self._delegate("on_after_batch_transfer", batch, dataloader_idx)

    def has_test_data(self, task: Task) -> bool:
        """Whether there is something to test a task on."""
        module = task.train
        own = isinstance(module, L.LightningDataModule) and is_overridden(
            "test_dataloader", module, L.LightningDataModule
        )
        return task.test is not None or own

    # ------------------------------------------------------------------ loaders

    def train_loader(self, task: Task) -> Any:
        """The training batches of a task: a :class:`TaskLoader` wherever they can be planned by index."""
        return self._loader_of(self._data(task).train, task, shuffle=True)

    def val_loader(self, task: Task) -> Any:
        """The validation batches of a task, in order; its training data where there is nothing else."""
        data = self._data(task)
        source = data.val if data.val is not None else data.train
        if data.val is None and not hasattr(source, "__len__") and not isinstance(source, L.LightningDataModule):
            return None  # a stream may be endless
        if isinstance(source, L.LightningDataModule):
            if not is_overridden("val_dataloader", source, L.LightningDataModule):
                return None
            return self._wrap(source.val_dataloader(), task, for_training=False)
        return self._loader_of(source, task, shuffle=False)

    def validated_on_training_data(self, task: Task) -> bool:
        """Whether a task's column of the matrix is measured on what it was trained on."""
        return self._data(task).val is None and not isinstance(task.train, L.LightningDataModule)

    def describe(self, task: Task) -> list[str]:
        """What is known of a task's training data, in words."""
        train = self._data(task).train
        if not isinstance(train, TokenDataset):
            return []
        tokens, loss = len(train.ids), sum(train.loss_tokens(i) for i in range(len(train)))
        masked = 1 - loss / max(tokens, 1)
        return [
            f"{len(train):,} samples, {tokens:,} tokens, {masked:.1%} of them without loss, {train.dropped} records"
            " dropped"
        ]

    # ------------------------------------------------------------------ inside

    def _prepare(self, task: Task) -> _Prepared:
        texts = {
            role: records.read_texts(getattr(task, role), task.name, role)
            for role in ("train", "val", "test")
            if records.is_text_source(getattr(task, role))
        }
        held_out = "train" in texts and task.val is None
        if held_out:
            texts["train"], texts["val"] = split_documents(texts["train"], self.val_fraction, self.seed)
        data = {role: getattr(task, role) for role in ("train", "val", "test")}
        for role, documents in texts.items():
            dataset = TokenDataset(tokenize(documents, self.tokenizer, self.max_length))
            if len(dataset) == 0:
                if role == "val" and held_out:
                    data[role], held_out = None, False  # too short to split
                    continue
                raise ValueError(f"task {task.name!r}, {role}: there is no token to predict in it")
            data[role] = dataset
        return _Prepared(data["train"], data["val"], data["test"], held_out)

    def _data(self, task: Task) -> _Prepared:
        if self._prepared is None:
            raise RuntimeError("TaskDataModule: call prepare_data() and setup() first; the Trainer does so by itself")
        return self._prepared[task.name]

    def _loader_of(self, source: Any, task: Task, shuffle: bool) -> Any:
        if isinstance(source, L.LightningDataModule):
            return self._wrap(source.train_dataloader() if shuffle else source.test_dataloader(), task, shuffle)
        if isinstance(source, IterableDataset):
            source = DataLoader(source, task.batch_size or self.batch_size, collate_fn=self.collate_fn)
        if isinstance(source, DataLoader) or not hasattr(source, "__getitem__"):
            return self._wrap(source, task, for_training=shuffle)
        if isinstance(source, TokenDataset):
            pad = self.tokenizer.pad_token_id
            collate: Any = TokenCollator(pad if pad is not None else self.tokenizer.eos_token_id or 0)
        else:
            collate = self.collate_fn
        return TaskLoader(
            source,
            task.batch_size or self.batch_size,
            collate,
            shuffle=shuffle,
            seed=self.seed * 1_000_003 + self.tasks.index(task),
            settings={"num_workers": self.num_workers},
            **self._ranks(),
        )

    def _wrap(self, loader: Any, task: Task, for_training: bool) -> Any:
        """A loader of somebody else's, made resumable where that is possible."""
        if why_not_plannable(loader) is not None or self._sharded_by_its_owner():
            return loader
        return TaskLoader.from_dataloader(
            loader,
            for_training=for_training,
            batch_size=task.batch_size,
            seed=self.seed * 1_000_003 + self.tasks.index(task),
            broadcast=None if self.trainer is None else self.trainer.strategy.broadcast,
            **self._ranks(),
        )

    def _sharded_by_its_owner(self) -> bool:
        """``Trainer(use_distributed_sampler=False)``: whoever made a loader shards it over ranks himself."""
        if self.trainer is None or self.trainer.world_size == 1:
            return False
        return not self.trainer._accelerator_connector.use_distributed_sampler

    def _ranks(self) -> dict[str, Any]:
        # Data parallel ranks: under tensor parallelism several processes share one batch.
        sampler = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return {"rank": sampler.get("rank", 0), "world_size": sampler.get("num_replicas", 1)}

    def _vocabulary_texts(self, tokenizer: TrainedBPE) -> list[str]:
        for task in self.trained_tasks:
            if records.is_text_source(task.train):
                return records.read_texts(task.train, task.name, "train")
        raise ValueError("tokenizer=TrainedBPE(…): there is no text to train it on")

    def _data_modules(self) -> list[L.LightningDataModule]:
        return [task.train for task in self.tasks if isinstance(task.train, L.LightningDataModule)]

    def _delegate(self, hook: str, batch: Any, dataloader_idx: int) -> Any:
        task = self.current if self.watch is None else self.tasks[self.watch]
        if isinstance(task.train, L.LightningDataModule):
            return getattr(task.train, hook)(batch, dataloader_idx)
        return batch


def as_tasks(tasks: Any) -> list[Task]:
    """A list of tasks from ``{name: data}``, ``{name: {arguments of Task}}``, or a list of tasks.

    Raises:
        ValueError: if there are none, two of one name, or none to train on.
        TypeError: if it is something else, or an argument of a task has an unknown name.
    """
    if isinstance(tasks, dict):
        listed = [_as_task(name, data) for name, data in tasks.items()]
    elif isinstance(tasks, (list, tuple)):
        listed = [task if isinstance(task, Task) else _as_task(None, task) for task in tasks]
    else:
        raise TypeError(f"tasks: expected {{name: data}} or a list of Task, got a {type(tasks).__name__}")
    if not listed:
        raise ValueError("tasks: there are none; give at least one, as in {'chat': 'data/chat.jsonl'}")
    names = [task.name for task in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: two tasks are called {twice[0]!r}; names must be unique")
    if all(task.watched for task in listed):
        raise ValueError("tasks: all of them are only watched (train=None): there is nothing to train on")
    return listed


def _as_task(name: str | None, data: Any) -> Task:
    if isinstance(data, Task):
        if name is not None and name != data.name:
            raise ValueError(f"tasks: {name!r} is the key of a Task that is called {data.name!r}")
        return data
    if isinstance(data, dict):
        known = list(Task.__dataclass_fields__)
        unknown = [key for key in data if key not in known]
        if unknown:
            raise TypeError(f"task {name or data.get('name')!r}: unknown argument {unknown[0]!r}; there are {known}")
        arguments: dict[str, Any] = ({"name": name} if name is not None else {}) | data
        return Task(**arguments)
    if name is None:
        raise TypeError(f"tasks: expected a Task in the list, got {_describe(data)}")
    return Task(name, train=data)


def _is_data(source: Any) -> bool:
    if isinstance(source, (list, tuple)):
        return bool(source) and not isinstance(source[0], (int, float))
    if isinstance(source, (str, Path, dict, set)):
        return False
    return isinstance(source, L.LightningDataModule) or hasattr(source, "__iter__") or hasattr(source, "__getitem__")


def _describe(source: Any) -> str:
    if isinstance(source, (list, tuple)) and not source:
        return "an empty list"
    columns = getattr(source, "column_names", None)
    if columns:
        return f"a {type(source).__name__} with the columns {columns}"
    return f"{source!r}" if isinstance(source, (int, float, str, Path)) else f"a {type(source).__name__}"
