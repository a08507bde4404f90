"""The DataModule of a sequence of tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.arguments import check_choice, check_integer, check_share
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.data.loader import TaskLoader
from lightning_cl.data.preview import preview
from lightning_cl.data.stream import StreamLoader
from lightning_cl.data.text.chat import has_template
from lightning_cl.data.text.layout import Layout
from lightning_cl.data.text.prompts import PromptDataset, join_prompts
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import check_text_source, is_text_source, read_texts
from lightning_cl.data.text.sources import as_tasks, describe_source, is_data, is_stream
from lightning_cl.data.text.text_tasks import (
    TextSettings,
    TokenStream,
    left_out,
    prepare_texts,
    split_sources,
    warn_odd_split,
    warn_validated_on_training_data,
)
from lightning_cl.data.text.tokenizer import TrainedBPE, fingerprint, load_tokenizer, pad_token_id, read_template
from lightning_cl.data.text.tokens import TokenCollator, TokenDataset
from lightning_cl.lightning_internals import shards_loaders, trains_on
from lightning_cl.tasks import Task


@dataclass
class _Prepared:
    """A task's data in the form that is trained on: data sets, or the user's own loaders and DataModules."""

    train: Any
    val: Any
    test: Any
    held_out: bool = False  # True if `val` was split off `train`
    texts: dict[str, Any] = field(default_factory=dict)  # the roles that were text, empty data sets too


class TaskDataModule(L.LightningDataModule):
    """The data of a sequence of tasks; :func:`~lightning_cl.fit_tasks` trains on them one after another.

    Text, completions and conversations become samples of at most `max_length` tokens. The loss is on what is to be
    learnt: all of a text, the completion, the assistant's turns. The samples are kept in a cache
    (``$LIGHTNING_CL_CACHE``, by default ``~/.cache/lightning_cl``) until data, tokenizer or settings change. A torch
    ``Dataset``, a ``DataLoader`` and a ``LightningDataModule`` are used as they are.

    Args:
        tasks: what to learn, in order, as ``{name: data}``, such as ``{mails: mails.jsonl, notes: notes.txt}``, or as a
            list of ``Task``. In the dictionary, data is what ``Task.train`` takes, or a dictionary of ``Task``'s
            arguments. ``{benchmark: trace, folder: …}`` reads the folder of a published benchmark: ``trace``,
            ``cl_benchmark`` or ``superni`` (:mod:`lightning_cl.data.benchmarks`).
        tokenizer: needed for tasks that are text. It is the name of a tokenizer on the hub, a folder, a ``.gguf`` file,
            ``sample:SmolLM2-135M-Instruct``, a ``transformers`` tokenizer, or :class:`~lightning_cl.data.TrainedBPE`,
            which trains a new vocabulary.
        max_length: the most tokens in a sample. Text is cut into blocks, so none of it is lost. Longer completions and
            conversations are cut off; a warning, the plan and the report count them.
        batch_size: samples in a batch, per device; with packing, blocks of `max_length` tokens.
        packing: join samples to full blocks; documents in a block do not see each other. It needs a model that
            separates documents by ``position_ids`` (:class:`~lightning_cl.data.text.collator.TokenCollator` lists them;
            ``CausalLM`` checks it before training).
        length_buckets: without packing, put training samples of similar length into a batch, for less padding.
        num_workers: worker processes that load samples; 0 loads in the main process, as streams always do.
        seed: seed of the order of the samples and of the validation split.
        collate_fn: joins samples of torch data sets to a batch; default: torch's.
        val_fraction: share of a text task that is held out for validation if the task has no `val`. Whole documents
            are held out, the same ones in every run. Copies of a document are all trained on, or all held out.
        on_bad_record: with ``error``, a malformed record stops the run before training; the message names file and
            line. A stream is read during training, so it stops there. With ``skip``, the record is left out, counted
            and warned about.
        path_header: begin each document from a folder or glob of source files with a line ``# file: <path>``.
        chat_template: Jinja text, or a file with it, instead of the tokenizer's own; base models often have none.
        template: write ``{"prompt", "completion"}`` and ``{"prompt", "answer"}`` as a user's and an assistant's turn in
            the chat template. By default they are joined without it, and the plan says so.
        last_turn: put loss on the assistant's last turn of a conversation only; by default all its turns bear loss.

    Attributes:
        index: index of the current task among the trained tasks. (``tasks`` becomes a list of ``Task``, and
            ``tokenizer`` the tokenizer itself as soon as the data is set up.)

    Raises:
        ValueError: for arguments out of range, two tasks of one name, or no task to train on.
    """

    def __init__(
        self,
        tasks: dict[str, Any] | list[Any],
        tokenizer: str | TrainedBPE | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        val_fraction: float = 0.05,
        length_buckets: bool = True,
        on_bad_record: Literal["error", "skip"] = "error",
        path_header: bool = False,
        chat_template: str | None = None,
        template: bool = False,
        last_turn: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = as_tasks(tasks)
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            check_integer(name, value, least, f"an integer of at least {least}")
        check_share("val_fraction", val_fraction, ends=False)
        check_choice("on_bad_record", on_bad_record, ("error", "skip"), "'error' or 'skip'")
        if isinstance(tokenizer, int | float):  # it would be ignored where no task is text
            raise ValueError(
                f"tokenizer={tokenizer!r}: expected a tokenizer, or the name, folder or file of one; a batch size is"
                f" given by its name, as batch_size={tokenizer!r}"
            )
        self.tokenizer: Any = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.seed, self.collate_fn, self.val_fraction = seed, collate_fn, val_fraction
        self.packing, self.length_buckets = bool(packing), bool(length_buckets)
        self.on_bad_record, self.path_header = on_bad_record, bool(path_header)
        self.chat_template = read_template(chat_template) if chat_template is not None else None
        self.template, self.last_turn = bool(template), bool(last_turn)
        self.index = 0
        self.watch: int | None = None
        self.driven = False
        self.expected_fingerprint: str | None = None
        self._prepared: dict[str, _Prepared] | None = None
        self._set_up: set[tuple[int, str]] = set()
        self._loader: TaskBatches | None = None
        self._loader_task: str | None = None
        self.check()

    # ------------------------------------------------------------------ the sequence

    @property
    def trained_tasks(self) -> list[Task]:
        """The tasks to train on, in order; the other tasks are only evaluated."""
        return [task for task in self.tasks if not task.watched]

    @property
    def current(self) -> Task:
        """The task whose batches ``train_dataloader`` gives."""
        return self.trained_tasks[self.index]

    @contextmanager
    def in_sequence(self) -> Iterator[None]:
        """Lets :meth:`setup` accept a fit of several tasks; in a plain ``trainer.fit`` it refuses that."""
        before, self.driven = self.driven, True
        try:
            yield
        finally:
            self.driven = before

    @contextmanager
    def showing(self, task: Task) -> Iterator[None]:
        """Makes validation, test and prediction use the loaders of one task, until the block ends or raises.

        Args:
            task: one of :attr:`tasks`; it may be a task that is only evaluated.

        Raises:
            ValueError: if the task is not one of them.
        """
        column = next((column for column, one in enumerate(self.tasks) if one is task), None)
        if column is None:
            raise ValueError(f"task {task.name!r}: expected one of the tasks {[one.name for one in self.tasks]}")
        with self.in_sequence():
            before, self.watch = self.watch, column
            try:
                yield
            finally:
                self.watch = before

    @property
    def shown(self) -> Task:
        """The task whose loaders for validation, test and prediction are given out now."""
        return self.current if self.watch is None else self.tasks[self.watch]

    def check(self) -> None:
        """Checks the tasks and their files before anything is built.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is empty or of an unknown kind, or if text has no tokenizer.
            TypeError: if a task's data is none of the known kinds.
        """
        for task in self.tasks:
            if task.metrics and not any(is_text_source(getattr(task, role)) for role in ("train", "val")):
                raise ValueError(
                    f"task {task.name!r}, metrics={task.metrics}: they score answers to prompts, and its data is no"
                    ' text: give records such as {"prompt", "answer"}, or no metrics'
                )
            for role in ("train", "val", "test"):
                source = Layout.of(task.columns, task.field).renamed(getattr(task, role))
                check_text_source(source, task.name, role)
                if is_text_source(source):
                    if self.tokenizer is None:
                        raise ValueError(
                            f"task {task.name!r}, {role}: text needs a tokenizer: give TaskDataModule(tokenizer=…), the"
                            " name of one on the hub, a folder, or TrainedBPE(vocab_size=…)"
                        )
                elif source is not None and (not is_data(source) or self._is_unknown_table(source)):
                    raise TypeError(
                        f"task {task.name!r}, {role}: expected a path, texts, records, a datasets.Dataset,"
                        f" a torch Dataset, a DataLoader or a LightningDataModule, got {describe_source(source)}"
                    )

    def _is_unknown_table(self, source: Any) -> bool:
        """Tells if a table has no columns that can be tokenised, although there is a tokenizer."""
        columns = getattr(source, "column_names", None)
        return self.tokenizer is not None and isinstance(columns, list) and "input_ids" not in columns

    def fingerprint(self) -> str | None:
        """A hash of the tokenizer; a resumed model must have the vocabulary that it was trained with."""
        return fingerprint(self.tokenizer) if hasattr(self.tokenizer, "get_vocab") else None

    @property
    def is_set_up(self) -> bool:
        """True if the data has been read: ``tokenizer`` is then a tokenizer."""
        return self._prepared is not None

    @property
    def longest_row(self) -> int | None:
        """Positions that a model needs for the longest row of a batch of text; None without text."""
        texts = [data for prepared in (self._prepared or {}).values() for data in prepared.texts.values()]
        if any(self.packing or isinstance(data, TokenStream) for data in texts):
            return self.max_length  # the padding after a short block has position numbers, too
        return max((data.longest for data in texts if len(data)), default=None)

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare_data(self) -> None:
        """Trains the vocabulary if there is one to train, tokenises, and calls ``prepare_data`` of tasks' DataModules.

        With several processes, Lightning calls it in one of them, before it calls ``setup`` in all. The others then
        read the tokens from the cache.
        """
        if isinstance(self.tokenizer, TrainedBPE):
            self.tokenizer.train(self._vocabulary_texts())
        if self._prepared is None and self.trainer is not None and self.trainer.world_size > 1:
            given = self.tokenizer
            self._load_tokenizer()
            for task in self.tasks:
                self._prepare(task)
            self.tokenizer = given
        for module in self._data_modules():
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all tasks, once."""
        # After fit_tasks the Trainer still refers to this DataModule, and a later fit on other data is allowed.
        # Without a Trainer, the user only looks at the data.
        trains = self.trainer is not None and trains_on(self.trainer, self)
        if stage == "fit" and not self.driven and trains and len(self.trained_tasks) > 1:
            raise RuntimeError(
                f"trainer.fit would train only one of these {len(self.trained_tasks)} tasks and look finished: use"
                " lightning_cl.fit_tasks(trainer, module, data), which trains them one after another"
            )
        for module in self._data_modules():
            module.trainer = self.trainer
            # Training data is needed before the first fit, so the stage `fit` is set up first. Each stage comes once.
            for needed in ("fit", stage or "fit"):
                if (id(module), needed) not in self._set_up:
                    self._set_up.add((id(module), needed))
                    module.setup(needed)
        if self._prepared is not None:
            return
        self._load_tokenizer()
        if self.expected_fingerprint not in (None, self.fingerprint()):
            raise ValueError(
                "tokenizer: it is not the one that the checkpoint was trained with; the model would read every text as"
                " noise. Give the same tokenizer, and for TrainedBPE the same first task"
            )
        self._prepared = {task.name: self._prepare(task) for task in self.tasks}

    def train_dataloader(self) -> Any:
        """The current task's batches."""
        loader = self.train_loader(self.current)
        if not isinstance(loader, TaskBatches):
            self._loader = None
            return loader
        if self._loader is not None and self._loader_task == self.current.name:
            loader.counts = self._loader.counts  # with reload_dataloaders_every_n_epochs, a task has several loaders
        if self.trainer is not None:
            loader.set_epoch(self.trainer.current_epoch)
        self._loader, self._loader_task = loader, self.current.name
        return loader

    def val_dataloader(self) -> Any:
        """Validation batches of the current task; inside :meth:`showing`, those of the shown task."""
        task = self.shown
        loader = self.val_loader(task)
        return [] if loader is None else loader

    def test_dataloader(self) -> Any:
        """Test batches of the task that is evaluated."""
        task = self.shown
        test = self._data(task).test
        if test is None and self.has_test_data(task):
            test = task.train
        return [] if test is None else self._loader_of(test, task, shuffle=False)

    def predict_dataloader(self) -> Any:
        """Prompts for generation from the task's test samples; without any, from validation or training samples.

        A batch is ``{"prompt", "reference"}``, lists of token ids. The reference is the last part of a sample that
        bears loss, such as the last answer. The prompt is all before it; a text without prompt gives its beginning.
        """
        task = self.shown
        data = self._data(task)
        source = next((part for part in (data.test, data.val, data.train) if isinstance(part, TokenDataset)), None)
        if source is None:
            raise ValueError(f"task {task.name!r}: there are no texts in it to predict from")
        ranks = self._ranks()["world_size"]
        if len(source) < ranks:
            raise ValueError(f"task {task.name!r}: {len(source)} samples to predict from, for {ranks} processes")
        return DataLoader(PromptDataset(source), batch_size=task.batch_size or self.batch_size, collate_fn=join_prompts)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Calls the same hook of the task's own DataModule, if the task has one."""
        return self._delegate("on_before_batch_transfer", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Calls the same hook of the task's own DataModule, if the task has one."""
        return self._delegate("on_after_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Calls the same hook of the task's own DataModule, if the task has one."""
        task = self.shown
        if isinstance(task.train, L.LightningDataModule):
            return task.train.transfer_batch_to_device(batch, device, dataloader_idx)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def has_test_data(self, task: Task) -> bool:
        """Returns True if there is something to test a task on."""
        module = task.train
        own = isinstance(module, L.LightningDataModule) and is_overridden(
            "test_dataloader", module, L.LightningDataModule
        )
        return own or split_sources(task)["test"] is not None

    # ------------------------------------------------------------------ loaders

    def train_loader(self, task: Task) -> Any:
        """The training batches of a task: a :class:`TaskLoader` if they can be planned by index."""
        return self._loader_of(self._data(task).train, task, shuffle=True)

    def val_loader(self, task: Task) -> Any:
        """The validation batches of a task, in order; without validation data, its training data."""
        data = self._data(task)
        source = data.val if data.val is not None else data.train
        if data.val is None and not hasattr(source, "__len__") and not isinstance(source, L.LightningDataModule):
            return None  # a stream may be endless
        if isinstance(source, L.LightningDataModule):
            if not is_overridden("val_dataloader", source, L.LightningDataModule):
                return None
            return self._wrap(source.val_dataloader(), task, for_training=False)
        return self._loader_of(source, task, shuffle=False)

    def samples_of(self, name: str, source: Any) -> Any:
        """Returns the training set of a task that is trained on all of this data; text becomes token samples.

        Args:
            name: name of the task, for messages.
            source: what ``Task.train`` takes.

        Raises:
            ValueError: for malformed records, or if there is no token to predict.
        """
        if not is_text_source(source):
            return source
        task = Task(name, train=source)
        sources = {**split_sources(task), "val": False, "test": None}  # nothing is held out
        return prepare_texts(task, sources, self.tokenizer, self.text_settings(task))["train"]

    def validated_on_training_data(self, task: Task) -> bool:
        """Returns True if a task's column of the matrix is measured on the task's training data."""
        return self._data(task).val is None and not isinstance(task.train, L.LightningDataModule)

    def describe(self, task: Task) -> list[str]:
        """Describes a task's training data in words."""
        train = self._data(task).train
        if not isinstance(train, TokenDataset):
            return []
        tokens, loss = len(train.ids), sum(train.loss_tokens(i) for i in range(len(train)))
        masked = 1 - loss / max(tokens, 1)
        counts = {"dropped": train.tally.dropped, "cut off": train.tally.truncated, "malformed": train.tally.bad}
        lines = [
            f"{len(train):,} samples, {tokens:,} tokens, {masked:.1%} of them without loss;"
            f" {', '.join(f'{count} {what}' for what, count in counts.items())}"
        ]
        if train.tally.held_out:
            held_out, records = train.tally.held_out, train.tally.records
            lines.append(f"held out for validation: {held_out:,} of {records:,} records, {held_out / records:.1%}")
        lines += [f"not used: {what}: {count:,}" for what, count in train.tally.left_out.items()]
        if train.tally.untemplated:
            lines.append(
                f"{train.tally.untemplated:,} prompts with completions, joined without the tokenizer's chat template"
                " (TaskDataModule(template=True) uses it)"
            )
        padding = self.train_loader(task).padding_share()
        how = "packed" if self.packing else "in buckets of like length" if self.length_buckets else "in random batches"
        return [*lines, f"{padding:.1%} padding ({how})"] if padding is not None else lines

    def training_data(self, task: Task) -> Any:
        """A task's training data: for text, token samples or a stream of them; else ``Task.train`` itself."""
        return self._data(task).train

    def text_data(self, task: Task) -> dict[str, Any]:
        """Returns the data sets and streams of token samples that were made from a task's text, by role."""
        return self._data(task).texts

    def preview(self, colour: bool = False) -> str:
        """Shows each task's first sample as text, marks what bears loss, and counts what was left out.

        It needs no model.

        Args:
            colour: also write what bears loss in green, for a terminal.
        """
        return preview(self, colour)

    def left_out(self, task: Task) -> dict[str, int]:
        """Returns the counts of a task's dropped and cut-off samples and malformed records, by role (``train_…``)."""
        return left_out(self._data(task).texts)

    # ------------------------------------------------------------------ inside

    def _load_tokenizer(self) -> None:
        if isinstance(self.tokenizer, TrainedBPE):
            self.tokenizer = self.tokenizer.train(self._vocabulary_texts())
        elif isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.chat_template is not None and self.tokenizer is not None:
            self.tokenizer = copy.deepcopy(self.tokenizer)  # the user's own keeps its template
            self.tokenizer.chat_template = self.chat_template
        if self.template and self.tokenizer is not None and not has_template(self.tokenizer):
            raise ValueError(
                "template=True: the tokenizer has no chat template; give TaskDataModule(chat_template=…), or"
                " template=False"
            )

    def _prepare(self, task: Task) -> _Prepared:
        sources = split_sources(task)
        texts = prepare_texts(task, sources, self.tokenizer, self.text_settings(task))
        data = {**sources, **texts}
        held_out = "val" in texts and sources["val"] is None
        if held_out and len(texts["val"]) == 0:
            warn_validated_on_training_data(task.name, texts["val"], self.max_length)
            data["val"], held_out = None, False
        if held_out:
            warn_odd_split(task.name, texts["train"], self.val_fraction, task.batch_size or self.batch_size)
        return _Prepared(data["train"], data["val"], data["test"], held_out, texts)

    def text_settings(self, task: Task) -> TextSettings:
        """Returns the settings that decide how a task's text becomes samples."""
        return TextSettings(
            self.max_length,
            self.val_fraction,
            self.seed,
            self.on_bad_record,
            self.path_header,
            self.template,
            self.last_turn,
            Layout.of(task.columns, task.field),
        )

    def _data(self, task: Task) -> _Prepared:
        if self._prepared is None:
            raise RuntimeError("TaskDataModule: call prepare_data() and setup() first; the Trainer does so by itself")
        return self._prepared[task.name]

    def _loader_of(self, source: Any, task: Task, shuffle: bool) -> Any:
        if isinstance(source, L.LightningDataModule):
            return self._wrap(source.train_dataloader() if shuffle else source.test_dataloader(), task, shuffle)
        if isinstance(source, TokenStream):
            return StreamLoader(
                source,
                task.batch_size or self.batch_size,
                self._collator(),
                block_length=self.max_length if self.packing else None,
                **self._ranks(),
            )
        if isinstance(source, IterableDataset):
            source = DataLoader(source, task.batch_size or self.batch_size, collate_fn=self.collate_fn)
        if isinstance(source, DataLoader) or not hasattr(source, "__getitem__"):
            return self._wrap(source, task, for_training=shuffle)
        tokens = isinstance(source, TokenDataset)
        return TaskLoader(
            source,
            task.batch_size or self.batch_size,
            self._collator() if tokens else self.collate_fn,
            shuffle=shuffle,
            seed=self.seed * 1_000_003 + self.tasks.index(task),
            settings={"num_workers": self.num_workers},
            block_length=self.max_length if tokens and self.packing else None,
            length_buckets=self.length_buckets,
            **self._ranks(),
        )

    def _collator(self) -> TokenCollator:
        return TokenCollator(pad_token_id(self.tokenizer))

    def _wrap(self, loader: Any, task: Task, for_training: bool) -> Any:
        """A user's loader, made resumable if that is possible."""
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
        """Tells if users divide their loaders among the ranks: ``Trainer(use_distributed_sampler=False)``."""
        if self.trainer is None or self.trainer.world_size == 1:
            return False
        return not shards_loaders(self.trainer)

    def _ranks(self) -> dict[str, Any]:
        # These are data-parallel ranks. Under tensor parallelism, several processes share one batch.
        sampler = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return {"rank": sampler.get("rank", 0), "world_size": sampler.get("num_replicas", 1)}

    def _vocabulary_texts(self) -> list[str]:
        for task in self.trained_tasks:
            layout = Layout.of(task.columns, task.field)
            source = layout.renamed(task.train)
            if is_text_source(source) and not is_stream(source):
                return read_texts(source, task.name, "train", Tally(self.on_bad_record), layout)
        raise ValueError("tokenizer=TrainedBPE(…): there is no text to train it on (a stream cannot be read twice)")

    def _data_modules(self) -> list[L.LightningDataModule]:
        return [task.train for task in self.tasks if isinstance(task.train, L.LightningDataModule)]

    def _delegate(self, hook: str, batch: Any, dataloader_idx: int) -> Any:
        task = self.shown
        if isinstance(task.train, L.LightningDataModule):
            return getattr(task.train, hook)(batch, dataloader_idx)
        return batch
