"""The one callback that asks all methods their questions, in order, and keeps the task index."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.core.begun_batch import BegunBatch
from lightning_cl.core.best_weights import load_best
from lightning_cl.core.checkpoint_io import read_checkpoint
from lightning_cl.core.checks import FORMAT, check_loaders, check_state, check_trainer, methods_of, named
from lightning_cl.core.deployment import View
from lightning_cl.core.loops import (
    count_from,
    forget_restart,
    leave_fit,
    let_methods_mix,
)
from lightning_cl.core.moments import after_step, before_step, consolidating
from lightning_cl.core.precision import amp_scale, reshard, scale_learning_rate
from lightning_cl.core.questions import Questions, answers
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.core.run_state import RunState
from lightning_cl.core.structure import Structure, names_of
from lightning_cl.core.task_files import before_end_file
from lightning_cl.data import TaskDataModule
from lightning_cl.data.batch_source import TaskBatches, is_indexed, is_stream
from lightning_cl.data.mixing.contents import Kinds
from lightning_cl.random_state import get_random_state, set_random_state, untouched_random_state
from lightning_cl.stopping import heed
from lightning_cl.tasks import TaskPosition

CHECKPOINT_KEY = "lightning_cl"


class TaskCoordinator(Callback):
    """Asks the methods of one Trainer their questions (see :mod:`lightning_cl.core.questions`).

    It is put at the end of ``trainer.callbacks`` by the first method's ``setup`` or by ``fit_tasks``. ``fit_tasks``
    tells it the current task; without ``fit_tasks``, each ``trainer.fit`` is one task.
    """

    def __init__(self) -> None:
        self.run = RunState()
        self.started = False
        self.ended = False
        self.at_boundary = False
        self.lr: float | None = None
        self.pristine: dict[int, Any] = {}  # other people's callbacks as they were before the first task
        self.load_best = False
        self.loads = False  # the coming fit of a sequence begins with a checkpoint
        self._structure = Structure()
        self._view = View()
        self._steps_at_fit = 0
        self._seconds_before = 0.0
        self._clock: float | None = None
        self._handles: list[RemovableHandle] = []
        self._batch = BegunBatch()
        self._resumed: dict[str, Any] | None = None
        self._states_to_restore: list[Any] | None = None
        self._loaded = False
        self._checked = False
        self._frozen: dict[str, Any] | None = None  # while a task ends: the checkpoint entry from before the end
        self.before_end: Path | None = None  # what was written before the methods' ends
        self._boundary_states: list[Any] | None = None  # random states from before the evaluation between tasks
        self._consolidated = False  # the checkpoint was written when the weights of the task's end were changed
        self._stop = False  # the checkpoint was written when training had been told to stop
        self._back: tuple[Path, bool] | None = None  # the checkpoint to go back to, and True to end the task there

    @classmethod
    def of(cls, trainer: L.Trainer) -> TaskCoordinator:
        """Returns the Trainer's coordinator, and makes it where there is none yet; all methods get its run."""
        found = [callback for callback in trainer.callbacks if isinstance(callback, cls)]  # type: ignore[attr-defined]
        coordinator = found[0] if found else cls()
        if not found:
            trainer.callbacks.append(coordinator)  # type: ignore[attr-defined]
        coordinator.run.methods = methods_of(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(getattr(callback, "run", None), RunState):
                callback.run = coordinator.run
        return coordinator

    @property
    def position(self) -> TaskPosition:
        """The current task's position in the sequence."""
        return self.run.position

    @property
    def kinds(self) -> Kinds | None:
        """The replayed parts of the current batch; None where nothing is replayed."""
        return self.run.kinds

    @property
    def costs(self) -> list[dict[str, float]]:
        """Steps, seconds and sample counts of each task that has ended."""
        return self.run.costs

    @staticmethod
    def methods(trainer: L.Trainer) -> list[Questions]:
        """The continual-learning callbacks of a Trainer, in its order."""
        return methods_of(trainer)

    # ------------------------------------------------------------------ checks

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.run.data is not None and not self._checked:
            self._checked = True
            check_loaders(self.run.data, self.methods(trainer))
        if stage == "fit":
            if not self.run.driven:
                self.run.names, self.at_boundary = [], False
            check_trainer(trainer, pl_module)
        self._structure.attach(
            trainer, pl_module, self.run, CHECKPOINT_KEY, lambda: self._tasks_to_build() if stage == "fit" else None
        )
        if stage == "fit":
            let_methods_mix(
                trainer, self.methods(trainer), check=not self.run.driven, on_loader=self._before_first_batch
            )

    def _tasks_to_build(self) -> int | None:
        """Counts the tasks that a fit needs parts for; None where a checkpoint's structure is built first."""
        return None if self.loads else self._tasks_up_to_now()

    def _tasks_up_to_now(self) -> int:
        """Counts the tasks up to the current one."""
        done = max((method.tasks_done for method in self.run.methods), default=0)
        return (self.run.position.index if self.run.driven else done) + 1

    def _before_first_batch(self, trainer: L.Trainer, loader: Any) -> None:
        """The last moment before Lightning looks where to continue, and fetches the first batch of a stream."""
        if self._resumed is None:
            return
        if not self.started:
            forget_restart(trainer)
        elif not self.ended and is_stream(loader) and self._resumed["loader"] is not None:
            loader.resume_from(self._resumed["loader"])

    # ------------------------------------------------------------------ start

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps_at_fit = trainer.global_step
        if self._stop and self._resumed is not None and self.started:
            trainer.should_stop = True  # as when it was written: Lightning forgets it, and would train on
        if self.run.limits is not None:
            count_from(trainer, self.run.limits, self.run.first_step)
        if self.lr is not None:
            for optimizer in trainer.optimizers:
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                scale_learning_rate(optimizer, schedulers, self.lr)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        methods = self.methods(trainer)
        reshard(pl_module)
        self._undo_end(trainer)
        resumed, self._resumed = self._resumed, None
        if not self.started or (self.ended and not self.run.driven):
            if not self.run.driven:
                done = max((m.tasks_done for m in methods), default=0)
                self.run.position = TaskPosition(done, f"task-{done}", done + 1)
            # All or nothing, as the end: an exception in here leads to a checkpoint that starts the task.
            self._frozen = self._entry(trainer, resumed["random_states"] if resumed is not None else None)
            self.started, self.ended, self.run.first_step = True, False, trainer.global_step
            self._seconds_before = 0.0
            for method in methods:
                method.task = self.run.position
                method.start_from(trainer, pl_module)
            for method in methods:
                method.on_task_start(trainer, pl_module)
            self._frozen = resumed_inside = None
        else:
            resumed_inside = resumed
        for method in methods:
            method.task = self.run.position
            method.place(trainer, pl_module)
        for optimizer in trainer.optimizers:
            hook = _after_step_hook(self, trainer, pl_module)
            self._handles.append(optimizer.register_step_post_hook(hook))
        self._clock = time.monotonic()
        if resumed is not None:
            self._restore_progress(trainer, resumed, inside=resumed_inside is not None)

    def _restore_progress(self, trainer: L.Trainer, resumed: dict[str, Any], inside: bool) -> None:
        """Restores the loader's position and the random states, so that the next batch is that of an unbroken run."""
        self._states_to_restore = resumed["random_states"]
        loader: Any = trainer.train_dataloader
        # A stream was resumed before its first batch was fetched.
        if inside and is_indexed(loader) and resumed["loader"] is not None:
            # Not through Lightning's own state of the loops: it is lost as soon as a module reads
            # `trainer.estimated_stepping_batches` in `configure_optimizers`.
            loader.resume_from(resumed["loader"], on_resumed=lambda: self._restore_random_state(trainer))
        else:
            self._restore_random_state(trainer)

    def _restore_random_state(self, trainer: L.Trainer) -> None:
        states, self._states_to_restore = self._states_to_restore, None
        if states is not None and len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])

    # ------------------------------------------------------------------ steps

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch.begin(trainer, pl_module, batch)
        loader: Any = trainer.train_dataloader
        self.run.kinds = trained = None
        if isinstance(loader, TaskBatches):
            self.run.kinds, trained = loader.begin()
            self._batch.loader_told(trainer)
        if trained is not None:
            for method in self.methods(trainer):
                method.on_batch(trainer, pl_module, trained)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        for method in self.methods(trainer):
            extra = method.extra_loss(trainer, pl_module, self._batch.content)
            if extra is not None:
                # The loss already carries the accumulation's division and the loss scale.
                factor = amp_scale(trainer) / trainer.accumulate_grad_batches
                loss.add_(extra.to(loss.dtype) * factor)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scale = amp_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        before_step(self.methods(trainer), trainer, pl_module, optimizer, scale)

    def _after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._batch.weights_moved()
        after_step(self.methods(trainer), self.run, trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch.end()
        for method, name in named(self.methods(trainer)):
            for key, value in method.scalars.items():
                pl_module.log(f"continual/{name}/{key}", value, on_step=True, on_epoch=False, batch_size=1)
            method.scalars.clear()

    # ------------------------------------------------------------------ end

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_task(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A checkpoint from the last step of a task, written before the task's end: Lightning sees nothing left to train
        # and calls no other hook.
        resumed, self._resumed = self._resumed, None
        if self.started and not self.ended and resumed is not None:
            pl_module.to(trainer.strategy.root_device)
            for method in self.methods(trainer):
                method.task = self.run.position
                method.place(trainer, pl_module)
            loader: Any = trainer.train_dataloader
            if is_indexed(loader) and resumed["loader"] is not None:
                loader.resume_from(resumed["loader"])
            self._states_to_restore = resumed["random_states"]
            self._end_task(trainer, pl_module)
            pl_module.cpu()
        elif self.run.driven and self.started and resumed is not None:
            # From a checkpoint that was written between the task's end and its boundary checkpoint.
            self._states_to_restore = resumed["random_states"]
            self._restore_random_state(trainer)
        elif not self.run.driven and trainer.global_step == self._steps_at_fit and self.methods(trainer):
            rank_zero_warn(
                "trainer.fit has trained no step, and the methods have seen nothing: the Trainer's max_epochs or"
                " max_steps had been reached before (they count all fits of a Trainer, and what a checkpoint has"
                " trained). Raise them, or use lightning_cl.fit_tasks, where they are per task"
            )

    def _end_task(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_handles()
        # Resumed after the last batch: none was fetched.
        self._restore_random_state(trainer)
        if self.ended:
            return  # resumed from a checkpoint that was written between this and the boundary
        trained = self._train_seconds()
        self._clock = None
        start = time.monotonic()
        reshard(pl_module)
        if self.load_best:
            load_best(trainer, self.run.position)
        self._undo_end(trainer)
        # All or nothing: if an exception interrupts the end, its checkpoint has the state from before the end. A run
        # that resumes from it repeats the whole end, with the same loader, buffers and random states.
        self._seconds_before = trained
        self._frozen = self._entry(trainer)
        self._save_before_end(trainer)
        self._consolidate(trainer, pl_module)
        for method in self.methods(trainer):
            heed(trainer, all_ranks=True)
            method.on_task_end(trainer, pl_module)
            method.tasks_done += 1
        self.ended, self._frozen = True, None
        begun, self.run.begin_seconds = self.run.begin_seconds, 0.0
        self.run.costs.append(
            {
                "steps": trainer.global_step - self.run.first_step,
                "begin_seconds": begun,
                "train_seconds": trained,
                "end_seconds": time.monotonic() - start,
                **self._sample_counts(trainer),
            }
        )

    def _consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets the methods change the weights, once: a run that resumes later finds them changed."""
        methods = self.methods(trainer)
        changing = consolidating(methods)
        done, self._consolidated = self._consolidated, False
        assert self._frozen is not None
        if done:
            self._frozen["consolidated"] = True
        if done or not changing:
            return
        for method in methods:
            method.close_path(trainer, pl_module)
        self._frozen["inexact"] = "while a method changed the weights at a task's end"
        for method in changing:
            method.consolidate(trainer, pl_module)
        self._frozen = self._entry(trainer) | {"consolidated": True}

    def _save_before_end(self, trainer: L.Trainer) -> None:
        """Keeps the training that is done in ``tasks/<index>-<name>.trained.ckpt``, where an end can take long."""
        if not self.run.driven or trainer.fast_dev_run or not trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
            return
        changes = any(method.consolidates for method in self.methods(trainer))
        if (changes or any(method.ends_long for method in self.methods(trainer))) and self.run.data is not None:
            index = self.run.position.index
            self.before_end = before_end_file(trainer, self.run.data.trained_tasks[index], index)
            trainer.save_checkpoint(self.before_end, weights_only=False)

    def _undo_end(self, trainer: L.Trainer) -> None:
        """The end of a task has failed and nothing was loaded since: no method has done its end."""
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            self._consolidated = bool(frozen.get("consolidated"))
            self._load_methods(trainer, frozen)

    def _train_seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._clock if self._clock is not None else 0.0)

    def _sample_counts(self, trainer: L.Trainer) -> dict[str, float]:
        loader = trainer.train_dataloader
        place = self._batch.position_in(trainer, loader)
        if place is None:
            return {}
        given = place["counts"]
        counts = torch.tensor(list(given.values()), dtype=torch.int64, device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        return dict(zip(given, counts.tolist(), strict=True))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_handles()
        self._view.leave()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove_handles()
        self._view.leave()
        self._structure.detach()

    # ------------------------------------------------------------------ the model is asked

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # in a fit, the current task is validated as it is trained
            self._view.enter(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._view.leave()

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._view.enter(trainer, pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._view.leave()

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._view.enter(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._view.leave()

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ state

    def begin_sequence(self, trainer: L.Trainer, data: TaskDataModule, checkpoint_path: Path | None) -> None:
        """A sequence starts, from its beginning or from a checkpoint (called by ``fit_tasks``)."""
        self.run.checkpoint_path = checkpoint_path
        self.run.driven, self.run.data = True, data
        self.run.names = [task.name for task in data.trained_tasks]
        self.started = self.ended = self.at_boundary = self._loaded = self._checked = False
        self._undo_end(trainer)
        self.before_end, self._structure.built = None, 0
        self._boundary_states, self._stop = None, False
        self.run.position, self.run.first_step, self.run.costs = (
            TaskPosition(0, self.run.names[0], len(self.run.names)),
            trainer.global_step,
            [],
        )
        self._resumed = self._back = None
        for method in self.methods(trainer):
            method.on_run_start(trainer)
        if checkpoint_path is None:
            for method in self.methods(trainer):
                method.on_sequence_start()

    def end_sequence(self) -> None:
        """``fit_tasks`` returns, or failed: a plain fit is a task by itself again."""
        self.run.driven, self.run.data, self.run.limits, self.run.checkpoint_path = False, None, None, None
        self.lr, self.loads = None, False
        self.load_best = False

    def begin_task(self, position: TaskPosition) -> None:
        """A fresh task is about to be fitted (called by ``fit_tasks``)."""
        self.run.position, self.started, self.ended, self.at_boundary = position, False, False, False

    def reach_boundary(self, trainer: L.Trainer) -> None:
        """The current task is done and evaluated: what is saved now starts the next one (called by ``fit_tasks``)."""
        self.at_boundary = True
        self.run.first_step = trainer.global_step
        # Whoever resumes from here starts the next task from these states; so does the run that resumes.
        self._resumed = {"loader": None, "random_states": from_all_ranks(get_random_state())}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Methods evaluate: training does not notice, nor does who resumes from a checkpoint that is written inside."""
        self._boundary_states = from_all_ranks(get_random_state())
        try:
            with untouched_random_state():
                yield
        finally:
            self._boundary_states = None

    def _entry(self, trainer: L.Trainer, states: list[Any] | None = None) -> dict[str, Any]:
        """Returns the part of a checkpoint that is the sequence's and its methods'; `states`: other random states."""
        loader = trainer.train_dataloader if trainer.state.fn == TrainerFn.FITTING and not self.at_boundary else None
        begun = self._batch.state(trainer) if loader is not None else None
        if self.at_boundary and self._resumed is not None:
            states = self._resumed["random_states"]
        states = states or self._boundary_states
        return {
            "format": FORMAT,
            "driven": bool(self.run.names),
            "tasks": list(self.run.names),
            "index": self.run.position.index + (1 if self.at_boundary else 0),
            "name": self.run.position.name,
            "started": self.started and not self.at_boundary,
            "ended": self.ended and not self.at_boundary,
            "built": self._structure.built,
            "first_step": self.run.first_step,
            "begin_seconds": self.run.begin_seconds,
            "train_seconds": self._train_seconds(),
            "fingerprint": self.run.data.fingerprint() if self.run.data is not None else None,
            "costs": [dict(cost) for cost in self.run.costs],
            "loader": self._batch.position_in(trainer, loader),
            "random_states": states or from_all_ranks(begun["random"] if begun is not None else get_random_state()),
            "methods": {
                name: {"tasks_done": method.tasks_done, "state": method.continual_state()}
                for method, name in named(self.methods(trainer))
            },
            "stop": trainer.should_stop and not self.at_boundary,
            "inexact": self._batch.why_inexact(trainer) if loader is not None else None,
        }

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not self.at_boundary
        begun = self._batch.state(trainer) if fitting else None
        if begun is not None:
            checkpoint["state_dict"] |= {
                n: b for n, b in (begun["buffers"] or {}).items() if n in checkpoint["state_dict"]
            }
        checkpoint[CHECKPOINT_KEY] = self._frozen if self._frozen is not None else self._entry(trainer)
        if self.at_boundary:
            # The next task gets a fresh optimizer and schedule, and scores of its own.
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
            for pristine in self.pristine.values():
                checkpoint["callbacks"].pop(pristine.callback.state_key, None)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            if CHECKPOINT_KEY not in checkpoint:
                raise MisconfigurationException(
                    "ckpt_path: the checkpoint was written without continual-learning callbacks; load its weights into"
                    " the module instead of resuming from it"
                )
            self.load(trainer, checkpoint[CHECKPOINT_KEY])
            names = names_of(self.run.names, self._tasks_up_to_now())
            self._structure.build(trainer, pl_module, self.run, names)
        elif CHECKPOINT_KEY in checkpoint:
            kept = checkpoint[CHECKPOINT_KEY]["methods"]
            for method, name in named(self.methods(trainer)):
                if name in kept and (answers(method, "deployed") or answers(method, "build")):
                    method.load_continual_state(kept[name]["state"])

    def go_back(self, trainer: L.Trainer, path: Path, end: bool = False) -> NoReturn:
        """Leaves the fit, which ``fit_tasks`` then resumes from a checkpoint of this task; call it between batches.

        Args:
            trainer: inside a fit of a sequence.
            path: a checkpoint that was written inside the task.
            end: end the task there.
        """
        self._back = path, end
        leave_fit()

    def went_back(self, trainer: L.Trainer) -> Path | None:
        """Returns the checkpoint that the task resumes from, after :meth:`go_back`; its state is restored."""
        back, self._back = self._back, None
        if back is None:
            return None
        path, end = back
        self._loaded = False
        self.load(trainer, read_checkpoint(path)[CHECKPOINT_KEY])
        self._stop = self._stop or end
        return path

    def load_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Loads a checkpoint's weights outside of the Trainer's stages, after the methods have built what they need."""
        self._structure.attach(trainer, pl_module, self.run, CHECKPOINT_KEY, lambda: None)
        try:
            pl_module.configure_model()
            pl_module.on_load_checkpoint(checkpoint)
            pl_module.load_state_dict(checkpoint["state_dict"])
        finally:
            self._structure.detach()

    def load(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        """Restores itself and all methods from a checkpoint's entry, once.

        Raises:
            MisconfigurationException: if the callbacks of the run are not those of the checkpoint.
        """
        if self._loaded:
            return
        self._loaded = True
        check_state(trainer, state)
        self.run.names = list(state["tasks"])
        self.run.position = TaskPosition(state["index"], state["name"], max(len(self.run.names), state["index"] + 1))
        self.started, self.ended, self.run.first_step = state["started"], state["ended"], state["first_step"]
        self._frozen = None
        self._consolidated = bool(state.get("consolidated"))
        self._stop = bool(state.get("stop"))  # earlier checkpoints do not have it
        if state.get("inexact"):
            rank_zero_warn(
                f"ckpt_path: the checkpoint was written {state['inexact']}. The run goes on from it, but not bit for"
                " bit as if it had not been stopped"
            )
        self._seconds_before = state["train_seconds"] if self.started else 0.0
        self.run.begin_seconds = state["begin_seconds"] if self.started else 0.0
        self.run.costs = [dict(cost) for cost in state["costs"]]
        self._resumed = {"loader": state["loader"], "random_states": state["random_states"]}
        self._load_methods(trainer, state)

    def _load_methods(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        for method, name in named(self.methods(trainer)):
            method.tasks_done = state["methods"][name]["tasks_done"]
            method.load_continual_state(state["methods"][name]["state"])


def _after_step_hook(coordinator: TaskCoordinator, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # After an overflow in fp16, the scaler skips the step; a fused optimizer is called, and skips it by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            coordinator._after_step(trainer, pl_module, optimizer)

    return hook
