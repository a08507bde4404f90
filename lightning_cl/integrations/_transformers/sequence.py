"""``fit_tasks`` for a ``transformers.Trainer``: one Trainer for each task, one model and one set of callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightning_cl.core.run_state import RunState, named
from lightning_cl.integrations._transformers.arguments import continual_args
from lightning_cl.integrations._transformers.callbacks import Replay
from lightning_cl.integrations._transformers.driver import STATE_FILE, TrainerHooks, load_methods, state_of
from lightning_cl.integrations._transformers.matrix import TaskMatrix
from lightning_cl.integrations._transformers.replay_dataset import ReplayDataset
from lightning_cl.integrations._transformers.state_file import (
    load_model_tensors,
    model_tensors,
    read_state,
    write_state,
)
from lightning_cl.random_state import get_random_state, set_random_state
from lightning_cl.tasks import Task, TaskPosition


def fit_tasks(
    make_trainer: Callable[[Task], Trainer],
    tasks: Sequence[Task],
    callbacks: Sequence[Any] = (),
    folder: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains a model on one task after another, each with a Trainer of its own.

    For each task: `make_trainer` gives a Trainer; the callbacks are added to it; with :class:`Replay` its training data
    is mixed with stored samples; it trains; the callbacks keep what they need; every task is evaluated. So optimizer
    and schedule are new in each task, and early stopping and best checkpoints are of one task.

    With a `folder`, the state at the end of each task is kept in ``tasks/<index>-<name>.safetensors`` (trainable
    parameters, buffers of the model, what the callbacks have learnt, random states), and the report is written. A run
    that was killed continues with ``resume=True`` from the end of its last task, and inside a task from the newest
    whole checkpoint of the Trainer. Its weights are then bit for bit those of a run that was not killed.

    Args:
        make_trainer: gets a task and returns its Trainer. All Trainers must have the same model object, and each must
            have an ``output_dir`` of its own if it writes checkpoints. ``task.train`` is what goes into
            ``Trainer(train_dataset=…)``.
        tasks: in order, each with ``train`` and, for a :class:`TaskMatrix`, ``val``: data sets as the Trainer takes
            them. One without ``train`` is only evaluated. Their other fields are for `make_trainer` to read.
        callbacks: this package's methods, and at most one :class:`TaskMatrix`.
        folder: the run's folder; None: nothing is written, and a run cannot be resumed.
        resume: True continues a killed run with the same arguments; where there is nothing, it begins.

    Returns:
        The retention summary of the :class:`TaskMatrix`; without one, an empty dictionary.

    Raises:
        ValueError: if arguments do not fit each other, or settings of a Trainer would break the callbacks.
        FileNotFoundError: if a checkpoint has no state of the callbacks.
    """
    run = _Run(list(tasks), list(callbacks), Path(folder) if folder is not None else None)
    if resume and folder is None:
        raise ValueError("resume=True: expected a folder, which has the state at the end of each task")
    return run.fit(make_trainer, resume)


class _Run:
    """A sequence of tasks."""

    def __init__(self, tasks: list[Task], callbacks: list[Any], folder: Path | None) -> None:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {names}: expected different names")
        wrong = [c for c in callbacks if not isinstance(c, (TrainerHooks, TaskMatrix))]
        if wrong:
            raise ValueError(
                f"callbacks: a {type(wrong[0]).__name__}, expected those of lightning_cl.integrations.transformers;"
                " other callbacks belong into the Trainer that make_trainer returns"
            )
        matrices = [c for c in callbacks if isinstance(c, TaskMatrix)]
        if len(matrices) > 1:
            raise ValueError(f"callbacks: {len(matrices)} TaskMatrix, expected at most one")
        self.tasks, self.folder = tasks, folder
        self.trained = [task for task in tasks if not task.watched]
        self.matrix = matrices[0] if matrices else None
        self.all: list[Any] = callbacks
        self.methods = [c for c in callbacks if isinstance(c, TrainerHooks)]
        self.costs: list[dict[str, float]] = []
        self.model: Any = None

    def fit(self, make_trainer: Callable[[Task], Trainer], resume: bool) -> dict[str, Any]:
        done = self._last_end() if resume else None
        run = RunState(methods=self.all, names=[task.name for task in self.trained])
        for method in self.all:
            method.run = run
        saved = None
        if done is None:
            for method in self.all:
                method.on_sequence_start()
        else:
            saved = read_state(self._end_file(done))
            load_methods(self.all, saved)
            self.costs = list(saved["costs"])
            set_random_state(saved["random"])
        for index, task in enumerate(self.trained):
            if index < (done or 0):
                continue
            trainer = self._trainer(make_trainer, task)
            if saved is not None:
                load_model_tensors(_model_of(trainer), saved["model"])
                saved = None
            elif index == 0:
                self._end(trainer, 0)
            self._train(trainer, task, index, self._checkpoint(trainer, resume))
        if saved is not None:  # all tasks were trained before
            load_model_tensors(_model_of(self._trainer(make_trainer, self.trained[-1])), saved["model"])
        return self.matrix.summary() if self.matrix is not None else {}

    def _trainer(self, make_trainer: Callable[[Task], Trainer], task: Task) -> Trainer:
        trainer = make_trainer(task)
        if self.model is not None and trainer.model is not self.model:
            raise ValueError(
                f"make_trainer: the Trainer of task {task.name!r} has another model than that of the task before;"
                " expected the same object, which has learnt that task"
            )
        self.model = trainer.model
        present = trainer.callback_handler.callbacks
        for method in self.methods:
            if method not in present:
                trainer.add_callback(method)
        replays = [method for method in self.methods if isinstance(method, Replay)]
        continual_args(trainer.args, replay=bool(replays))
        for replay in replays:
            args = trainer.args
            trainer.train_dataset = replay.mix(
                trainer.train_dataset,
                batch_size=args.per_device_train_batch_size,
                epochs=max(1, math.ceil(args.num_train_epochs)),
            )
        return trainer

    def _train(self, trainer: Trainer, task: Task, index: int, checkpoint: Path | None) -> None:
        for method in self.methods:
            method.position = TaskPosition(index, task.name, len(self.trained))
        start = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            for method in self.methods:
                method.position = None
        ends = max((method.end_seconds for method in self.methods), default=0.0)
        state, args, dataset = trainer.state, trainer.args, trainer.train_dataset
        cost = {
            "steps": float(state.global_step),
            "train_seconds": time.monotonic() - start - ends,
            "end_seconds": ends,
        }
        seen = state.global_step * args.gradient_accumulation_steps * args.per_device_train_batch_size
        if isinstance(dataset, Sized):  # a stream has no end that a last batch is cut at
            seen = min(seen, round((state.epoch or 0.0) * len(dataset)))
        if isinstance(dataset, ReplayDataset):
            cost |= dataset.counts(seen)
        else:
            cost |= {"new_samples": float(seen), "replayed_samples": 0.0}
        self.costs.append(cost)
        self._end(trainer, index + 1)

    def _end(self, trainer: Trainer, done: int) -> None:
        """Measures a row and writes what a resumed run starts from, when some tasks have ended."""
        if self.matrix is not None:
            self.matrix.measure(trainer, self.tasks, done)
            self.matrix.tasks_done = done
            if done:
                self.matrix.write(self.folder, named(self.all), self.costs, final=done == len(self.trained))
        if self.folder is not None:
            own = {"costs": self.costs, "model": model_tensors(_model_of(trainer)), "random": get_random_state()}
            write_state(self._end_file(done), state_of(self.all) | own)

    # ------------------------------------------------------------------ files

    def _end_file(self, done: int) -> Path:
        assert self.folder is not None
        name = f"{done - 1}-{self.trained[done - 1].slug}" if done else "start"
        return self.folder / "tasks" / f"{name}.safetensors"

    def _last_end(self) -> int | None:
        """Counts the tasks that have ended; None if the run has not begun."""
        return next((n for n in range(len(self.trained), -1, -1) if self._end_file(n).is_file()), None)

    def _checkpoint(self, trainer: Trainer, resume: bool) -> Path | None:
        """Returns the newest whole checkpoint of a task that was interrupted."""
        if not resume:
            return None
        found = Path(str(trainer.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        steps = sorted((int(p.name.rpartition("-")[2]), p) for p in found if p.name.rpartition("-")[2].isdigit())
        whole = [path for _, path in steps if not self.methods or (path / STATE_FILE).is_file()]
        if steps and not whole:
            raise FileNotFoundError(
                f"{steps[-1][1] / STATE_FILE}: no checkpoint of this task has the state of the callbacks; delete the"
                " checkpoints, and the task is trained from its beginning"
            )
        return whole[-1] if whole else None


def _model_of(trainer: Trainer) -> nn.Module:
    model = trainer.model
    assert isinstance(model, nn.Module)
    return model
