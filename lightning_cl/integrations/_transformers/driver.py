"""Asks the methods of one ``transformers.Trainer`` their questions, in the order of the library's coordinator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from lightning_cl.core.checks import check_trainer
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.core.moments import after_step, before_step, consolidating
from lightning_cl.core.questions import Questions
from lightning_cl.core.run_state import Limits, RunState, named
from lightning_cl.integrations._transformers.arguments import continual_args
from lightning_cl.integrations._transformers.replay_dataset import ReplayDataset
from lightning_cl.integrations._transformers.state_file import read_state, write_state
from lightning_cl.integrations._transformers.view import ModelModule, TrainerView
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import TaskPosition

STATE_FILE = "continual.safetensors"
FORMAT = 1


class TaskDriver:
    """One call of ``trainer.train()``, which is one task: the methods take part in it in the Trainer's order.

    The callbacks of one Trainer do not know each other. All that are called with the same training state belong
    together, and the first of them asks the questions of all.

    Args:
        args: the arguments of training.
        state: the Trainer's state.
        model: the bare model.
        loader: the training loader.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, loader: Any) -> None:
        self.args, self.state, self.loader = args, state, loader
        self.module = ModelModule(model)
        self.methods: list[Questions] = []
        self.begun = False
        self.view: Any = None

    @classmethod
    def of(cls, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, loader: Any) -> TaskDriver:
        """Returns the driver of this call of ``train``; makes it for the first callback."""
        driver = _drivers.get(model)
        if driver is None or driver.state is not state:
            driver = _drivers[model] = cls(args, state, model, loader)
        return driver

    # ------------------------------------------------------------------ start

    def begin(self) -> None:
        """Starts the task, or resumes it: called when all callbacks have joined, before the first batch."""
        if self.begun:
            return
        self.begun = True
        continual_args(self.args, replay=isinstance(self.loader.dataset, ReplayDataset))
        self.view = TrainerView(self.args, self.state, self.module, self.loader, list(self.methods))
        coordinator = TaskCoordinator.of(self.view)
        self.run = coordinator.run
        self.run.limits = Limits(None, int(self.state.max_steps), None)
        check_trainer(self.view, self.module)
        with untouched_random_state():
            self._start()

    def _start(self) -> None:
        saved = self._read() if self.state.global_step > 0 else None
        if saved is not None:
            self._load(saved)
        done = max(method.tasks_done for method in self.methods)
        given = next((at for m in self.methods if (at := getattr(m, "position", None)) is not None), None)
        self.run.position = given or TaskPosition(done, f"task-{done}", done + 1)
        for method in self.methods:
            if getattr(method, "last_task", True) is False:
                raise ValueError(
                    f"{type(method).__name__}(last_task=False): a Trainer does not know which task is the last; leave"
                    " it out"
                )
            method.setup(self.view, self.module, "fit")
            method.task = self.run.position
        if saved is None:
            for method in self.methods:
                method.start_from(self.view, self.module)
            for method in self.methods:
                method.on_task_start(self.view, self.module)
        for method in self.methods:
            method.place(self.view, self.module)

    # ------------------------------------------------------------------ steps

    def before_step(self, optimizer: Any) -> None:
        """Gradients are complete: observers first, then edits."""
        before_step(self.methods, self.view, self.module, optimizer, 1.0)

    def after_step(self, optimizer: Any) -> None:
        """The optimizer has made its step: edits of the weights first, then observers."""
        after_step(self.methods, self.run, self.view, self.module, optimizer)

    def scalars(self) -> dict[str, float]:
        """Returns what the methods have logged since the last call."""
        found: dict[str, float] = {}
        for method, name in named(self.methods):
            found |= {f"continual/{name}/{key}": float(value) for key, value in method.scalars.items()}
            method.scalars.clear()
        return found

    # ------------------------------------------------------------------ end

    def end(self) -> None:
        """Ends the task: weights change first, then importances and buffers are made from them."""
        self.begin()
        start = time.monotonic()
        with untouched_random_state():
            changing = consolidating(self.methods)
            for method in self.methods if changing else ():
                method.close_path(self.view, self.module)
            for method in changing:
                method.consolidate(self.view, self.module)
            for method in self.methods:
                method.on_task_end(self.view, self.module)
                method.tasks_done += 1
        for method in self.methods:
            method.end_seconds = time.monotonic() - start  # type: ignore[attr-defined]
        _drivers.pop(self.module.model, None)

    # ------------------------------------------------------------------ state

    def save(self) -> None:
        """Writes the methods' state into the checkpoint that the Trainer has just written.

        Raises:
            FileNotFoundError: if the checkpoint is not in the folder ``output_dir``.
        """
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: the Trainer has written no checkpoint there (does a search of hyperparameters choose other"
                " folders?); without it what the methods have learnt would be lost"
            )
        write_state(folder / STATE_FILE, state_of(self.methods) | {"plan": self._plan()})

    def _plan(self) -> str | None:
        dataset = self.loader.dataset
        return dataset.fingerprint() if isinstance(dataset, ReplayDataset) else None

    def _read(self) -> dict[str, Any]:
        given = self.args.resume_from_checkpoint
        own = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folders = [Path(given)] if isinstance(given, str) and Path(given).is_dir() else []
        files = [folder / STATE_FILE for folder in [*folders, own]]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{files[0]}: training resumes at step {self.state.global_step}, and what"
                f" {', '.join(name for _, name in named(self.methods))} had learnt is not there: nothing would be"
                " protected. Resume from a checkpoint that was written with these callbacks, or from the one before if"
                " the process was killed while it wrote this one"
            )
        return read_state(found)

    def _load(self, saved: dict[str, Any]) -> None:
        if saved["plan"] != self._plan():
            raise ValueError(
                "train_dataset: the plan of new and replayed samples is not that of the run that is resumed; restore"
                " the callbacks with load_state before the data set is made, and give it the same samples and settings"
            )
        load_methods(self.methods, saved)


def state_of(methods: list[Any]) -> dict[str, Any]:
    """Returns the state of methods for a file."""
    return {
        "format": FORMAT,
        "methods": {
            name: {"tasks_done": method.tasks_done, "state": method.continual_state()}
            for method, name in named(methods)
        },
    }


def load_state(callbacks: Sequence[Any], checkpoint: str | Path) -> None:
    """Restores callbacks from a Trainer's checkpoint, before the Trainer is made.

    A Trainer that resumes does it by itself. It is needed before :meth:`Replay.mix`, whose plan is made of the buffer.

    Args:
        callbacks: this package's methods, all that the checkpoint was written with, in their order.
        checkpoint: the folder ``checkpoint-<step>``.

    Raises:
        FileNotFoundError: if the folder has no state of callbacks.
        ValueError: if it has the state of others.
    """
    run = RunState(methods=list(callbacks))
    for method in callbacks:
        method.run = run
    load_methods(list(callbacks), read_state(Path(checkpoint) / STATE_FILE))


def load_methods(methods: list[Any], saved: dict[str, Any]) -> None:
    """Restores :func:`state_of`.

    Raises:
        ValueError: if the callbacks are not those of the file.
    """
    ours, theirs = {name for _, name in named(methods)}, set(saved["methods"])
    if ours != theirs:
        raise ValueError(
            f"callbacks: the checkpoint has the state of {sorted(theirs)}, and the Trainer has {sorted(ours)}; resume"
            " with the same callbacks"
        )
    for method, name in named(methods):
        method.tasks_done = saved["methods"][name]["tasks_done"]
        method.load_continual_state(saved["methods"][name]["state"])


_drivers: WeakKeyDictionary[torch.nn.Module, TaskDriver] = WeakKeyDictionary()


class TrainerHooks(TrainerCallback):
    """A method's place in a ``transformers.Trainer``: its hooks hand over to the :class:`TaskDriver`.

    Attributes:
        position: the task's place in a sequence; None: each call of ``train`` is the next task.
        end_seconds: the time that the end of the last task took, for all callbacks together.
    """

    position: TaskPosition | None = None
    end_seconds: float = 0.0
    _driver: TaskDriver | None = None

    def _leads(self) -> TaskDriver | None:
        """Returns the driver if this callback is the first one of its Trainer."""
        driver = self._driver
        return driver if driver is not None and driver.methods[0] is self else None  # type: ignore[comparison-overlap]

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._driver = TaskDriver.of(args, state, kwargs["model"], kwargs["train_dataloader"])
        self._driver.methods.append(self)  # type: ignore[arg-type]

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (driver := self._leads()) is not None:
            driver.begin()

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (driver := self._leads()) is not None:
            driver.before_step(kwargs["optimizer"])

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (driver := self._leads()) is not None:
            driver.after_step(kwargs["optimizer"])

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (driver := self._leads()) is not None and driver.begun:
            scalars = driver.scalars()
            for logs in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
                if logs is not None:
                    logs.update(scalars)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (driver := self._leads()) is not None and driver.begun and args.should_save:
            driver.save()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (driver := self._leads()) is not None:
            driver.end()
            for method in driver.methods:
                method._driver = None  # type: ignore[attr-defined]
