"""A guard that looks at earlier tasks while a new one is trained, and acts when a budget is surely exceeded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer, check_share
from lightning_cl.callbacks.monitoring.guard_actions import ACTIONS, Remedies, copy_of, interpolate_back, on_cpu
from lightning_cl.callbacks.monitoring.guard_report import final_decisions, guard_sentences, losses_file
from lightning_cl.callbacks.monitoring.guard_schedule import Schedule
from lightning_cl.callbacks.monitoring.guard_sets import GuardSets
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.core.loops import steps_of_current_task
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import tensor_bytes
from lightning_cl.core.questions import answers
from lightning_cl.core.task_files import safe_file
from lightning_cl.data.batch_source import is_stream
from lightning_cl.data.module import TaskDataModule
from lightning_cl.files import replace_file
from lightning_cl.functional.guard import Rise, allowed_rise, check_budget, check_confidence, look_error, paired_rise

Action = Literal["warn", "replay", "lr", "interpolate", "rollback", "stop"]
Unit = Literal["retained", "nats"]
_DOUBLINGS = 3  # of the sequences of a look, while the answer is not clear


class ForgettingBudget(ContinualCallback):
    """Keeps forgetting within a budget: it measures earlier and watched tasks during training, and acts where needed.

    At each look, the losses of held-out sequences are compared with the losses of the same sequences when their task
    was learnt (a watched task: before the first task). A task is in ``breach`` if the mean rise is surely more than
    allowed, and ``safe`` if it is surely not more. Otherwise twice as many sequences are looked at, up to eight times
    `samples`. The probability of any wrong breach in a whole run is at most ``1 − confidence``, over all looks and
    tasks, where the differences are roughly normal (:mod:`lightning_cl.functional.guard` has the formulas, and says
    what rare large losses do). After `patience` breaches of a task in a row, the
    next action of the list is taken; the last one is repeated, except ``rollback``. Each task begins with the first.

    ==============  ==================================================================================================
    ``warn``        says so
    ``replay``      doubles the replayed share, up to `replay_cap`: stored samples take the places of new ones, which
                    are then not trained on in that epoch; the number of steps stays
    ``lr``          halves the learning rates of all groups, for the rest of the task and under every schedule
    ``interpolate`` moves the weights back towards the last safe ones, as little as is needed by the guard's sequences
    ``rollback``    goes back to the last safe look (before one: to the task's first step): weights, optimizer,
                    schedule, random states, position in the data, importances and buffers are those of that moment.
                    The earlier actions stay in effect, and the next one of the list is taken at once. If there is
                    none, the task ends there
    ``stop``        ends the task
    ==============  ==================================================================================================

    The sequences are drawn from a task's validation data, which the matrix is measured on too: scores after an action
    are chosen on them, a little. It needs :func:`~lightning_cl.fit_tasks`. All ranks decide from the same reduced
    numbers, and a resumed run decides as the run that was not stopped.

    Memory: three numbers a sequence; with ``interpolate`` a copy of the trainable parameters, also in checkpoints; with
    ``rollback`` one checkpoint on disk (``guard/`` in the run's folder), written at each safe look. Compute: with
    ``every="auto"`` at most 2 % of a task's work, with fewer sequences where tasks are short; at each task's start and
    end a forward pass over the sequences.

    Args:
        budget: with `unit` ``retained`` the share to be kept (default: 0.9), and with ``nats`` the rise to be allowed.
        unit: ``retained``: the share of the fall in loss from just before a task's training to its end; a watched
            task's loss may rise by the share ``1 − budget`` of itself. At least 0.01 nats are always allowed. ``nats``:
            the rise of a sequence's mean loss.
        every: optimizer steps between looks. ``auto``: as the work of a look allows; it is counted, not timed.
        samples: number of sequences of a task.
        action: the actions, in order; an empty list only measures.
        confidence: the probability that a run has no wrong breach, over all looks and tasks.
        patience: breaches in a row before an action.
        grace_steps: steps of a task before the first look, since losses may rise and recover right after a switch.
        tasks: names of the tasks to guard, or ``all``.
        replay_cap: the largest replayed share that ``replay`` leads to.
        seed: seed for the choice of sequences.

    Attributes:
        looks: one entry for each task at each look: ``step`` of the run, ``training`` (the task that is trained),
            ``task``, ``D`` (mean rise in nats), ``SE``, ``n``, ``allowed``, ``decision`` and ``action``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import ForgettingBudget
        >>> guard = ForgettingBudget(0.9, action=["warn", "lr", "rollback"])
        >>> trainer = L.Trainer(callbacks=[guard], accelerator="cpu", logger=False)
        >>> guard.unit
        'retained'
    """

    edit_order = 3

    def __init__(
        self,
        budget: float | None = None,
        unit: Unit = "retained",
        every: int | Literal["auto"] = "auto",
        samples: int = 64,
        action: Sequence[Action] = ("warn",),
        confidence: float = 0.95,
        patience: int = 2,
        grace_steps: int = 0,
        tasks: list[str] | Literal["all"] = "all",
        replay_cap: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.unit: Unit = check_choice("unit", unit, ("retained", "nats"))  # type: ignore[assignment]
        self.budget = check_budget("budget", budget, unit)
        if isinstance(action, str) or not all(one in ACTIONS for one in action):
            raise ValueError(f"action={action!r}: expected a list of {', '.join(ACTIONS)}")
        if every != "auto":
            check_integer("every", every, 1, "a number of optimizer steps, or 'auto'")
        if isinstance(tasks, str) and tasks != "all":
            raise ValueError(f"tasks={tasks!r}: expected a list of names, or 'all'")
        check_integer("samples", samples, 8)
        self.every, self.samples, self.action = every, samples, list(action)
        self.confidence = check_confidence("confidence", confidence)
        self.patience = check_integer("patience", patience, 1)
        self.grace_steps = check_integer("grace_steps", grace_steps, 0)
        self.tasks = tasks
        check_share("replay_cap", replay_cap, ends=False)
        self.replay_cap, self.seed = replay_cap, check_integer("seed", seed)
        self.looks: list[dict[str, Any]] = []
        self.seconds = 0.0
        names = None if tasks == "all" else list(tasks)
        self.sets = GuardSets(samples * 2**_DOUBLINGS, seed, names, type(self).__name__)
        self._look_number = 0
        self._carried: dict[str, Any] | None = None
        self._begin_task()

    def _begin_task(self) -> None:
        self._schedule: Schedule | None = None
        self._step = self._rung = 0
        self._breaches: dict[str, int] = {}
        self._remedies = Remedies(self.replay_cap)
        self._safe: dict[str, Tensor] = {}
        self._snapshot: Path | None = None

    # ------------------------------------------------------------------ checks

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        name = type(self).__name__
        if not self.run.driven:
            raise MisconfigurationException(
                f"{name}: a plain trainer.fit knows no earlier tasks to guard; use lightning_cl.fit_tasks"
            )
        refuse_sharded(trainer, f"{name}: single sequences are not measured with")
        for method in self.run.methods:
            if answers(method, "deployed"):
                raise MisconfigurationException(
                    f"{name} with {type(method).__name__}: an earlier task is answered with other weights than those"
                    f" that are trained, so that a look at these says nothing; leave {name} out"
                )
        if "replay" in self.action and not any(method.replays for method in self.run.methods):
            raise MisconfigurationException(
                f"{name}(action={self.action!r}): there is no method that replays; add Replay(), or leave out 'replay'"
            )
        if "rollback" in self.action and not trainer.checkpoint_callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{name}(action={self.action!r}): a rollback needs a checkpoint on disk, and"
                " Trainer(enable_checkpointing=False) wants none; leave out 'rollback', or that argument"
            )
        if "rollback" in self.action and TaskCoordinator.of(trainer).load_best:
            raise MisconfigurationException(
                f"{name}(action={self.action!r}) with load_best=True: what is trained before a rollback may delete the"
                " best checkpoint that it goes back to; leave out one of the two"
            )
        if self.run.data is not None:
            self.sets.check_names(self.run.data)

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        packed = getattr(loader, "block_length", None) is not None
        if "replay" in self.action and (packed or is_stream(loader)):
            raise MisconfigurationException(
                f"{type(self).__name__}(action={self.action!r}): the replayed share cannot be raised inside a task of"
                f" {'packed rows' if packed else 'a stream'}, as {task!r} is; leave out 'replay'"
            )

    # ------------------------------------------------------------------ begin and end of a task

    @override
    def on_sequence_start(self) -> None:
        self.looks, self.seconds, self._look_number, self.sets.sets = [], 0.0, 0, {}
        self._begin_task()

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        self._drop_snapshot(trainer)
        self._begin_task()
        data = self._data
        self.sets.begin_task(trainer, pl_module, data, 2 if trainer.fast_dev_run else self.sets.most)  # type: ignore[attr-defined]
        names = self.sets.guarded(self.task.name)
        if not names or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        steps = steps_of_current_task(trainer, self.run.limits)
        every = None if self.every == "auto" else self.every
        lengths = [self.sets.tokens(data, name) for name in names]
        self._schedule = Schedule.of_task(trainer, steps, lengths, self.samples, every, self.grace_steps)
        if self._schedule.too_few():
            rank_zero_warn(
                f"{type(self).__name__}: {self.task} has {steps} steps, and the first look would be after"
                f" {self._schedule.next}: it is not guarded. Give a smaller every=… or grace_steps"
            )

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sets.end_task(trainer, pl_module, self._data)

    @property
    def _data(self) -> TaskDataModule:
        assert self.run.data is not None
        return self.run.data

    @override
    def after_boundary(self, trainer: L.Trainer, trained: int, final: bool) -> None:
        folder = run_folder(trainer)  # asked on all ranks
        if trained and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            replace_file(folder / "losses.json", lambda path: path.write_text(losses_file(self, trained)))

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._drop_snapshot(trainer)

    # ------------------------------------------------------------------ looks

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._remedies.pending:
            self._remedies.catch_up(trainer)

    # Not after the optimizer's step: a checkpoint can be written here, and ModelCheckpoint writes its own after it.
    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step - self.run.first_step
        if self._schedule is None or step <= self._step:
            return
        is_first, self._step = self._step == 0, step
        start = time.monotonic()
        try:
            if is_first:
                self._keep(trainer, pl_module)
            if step >= self._schedule.next:
                self._look(trainer, pl_module, step)
        finally:
            self.seconds += time.monotonic() - start

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        assert self._schedule is not None
        assert self.task is not None
        names = self.sets.guarded(self.task.name)
        self._look_number += 1
        # The bound has two sides, and each of them may err so often.
        alpha = 2.0 * look_error(1.0 - self.confidence, self._look_number, len(names))
        spent = 0.0
        found: dict[str, Rise] = {}
        for name in names:
            found[name], work = self._measure(trainer, pl_module, name, alpha, spent)
            spent += work
        found = trainer.strategy.broadcast(found)
        self._schedule.looked(step, spent)
        for name, rise in found.items():
            self._breaches[name] = self._breaches.get(name, 0) + 1 if rise.decision == "breach" else 0
            self.looks.append(
                {
                    "step": trainer.global_step,
                    "training": self.task.name,
                    "task": name,
                    "D": rise.mean,
                    "SE": rise.error,
                    "n": rise.size,
                    "allowed": rise.allowed,
                    "decision": rise.decision,
                    "action": "",
                }
            )
            self.log_scalar(f"rise/{name}", rise.mean)
        if all(rise.decision == "safe" for rise in found.values()):
            self._keep(trainer, pl_module)
        if self.action and any(count >= self.patience for count in self._breaches.values()):
            self._act(trainer, pl_module, found)

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, name: str, alpha: float, spent: float | None = None
    ) -> tuple[Rise, float]:
        """Measures a task's rise, and returns the work too.

        With `spent`, the work of this look so far, more and more sequences are looked at until the answer is clear.
        """
        assert self._schedule is not None
        one, first = self.sets.sets[name], self._schedule.samples
        assert one.reference is not None
        each = self._schedule.look_work / len(self.sets.guarded(self.run.position.name))
        losses = torch.empty(0, dtype=torch.float64)
        while True:
            end = min(first if not len(losses) else 2 * len(losses), one.size)
            losses = torch.cat([losses, self.sets.measure(trainer, pl_module, self._data, name, len(losses), end)])
            before = None if one.watched or one.before is None else one.before[:end]
            allowed = allowed_rise(self.unit, self.budget, one.reference[:end], before)
            rise = paired_rise(losses, one.reference[:end], allowed, alpha, min(first, one.size))
            more = each * (min(2 * end, one.size) - end)
            if rise.decision != "uncertain" or end == one.size or spent is None:
                return rise, each * end
            if not self._schedule.may_look_longer(spent + each * end + more):
                return rise, each * end

    # ------------------------------------------------------------------ actions

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps what ``interpolate`` and ``rollback`` go back to; called when all tasks are safe."""
        if "interpolate" in self.action:
            self._safe = copy_of(pl_module)
        if "rollback" in self.action:
            index = self.run.position.index
            self._snapshot = safe_file(trainer, self._data.trained_tasks[index], index).absolute()
            trainer.save_checkpoint(self._snapshot, weights_only=False)

    def _drop_snapshot(self, trainer: L.Trainer) -> None:
        path, self._snapshot = self._snapshot, None
        if path is not None and trainer.is_global_zero:
            path.unlink(missing_ok=True)
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()

    def _act(self, trainer: L.Trainer, pl_module: L.LightningModule, found: dict[str, Rise]) -> None:
        """Takes the next action that is possible."""
        for action in self.action[self._rung :] or self.action[-1:]:
            self._rung += 1
            if action == "rollback":
                if trainer.strategy.broadcast(self._snapshot is not None and self._snapshot.is_file()):
                    self._roll_back(trainer, found)
            elif (done := self._take(action, trainer, pl_module, found)) is not None:
                self._tell(action, done, found)
                return
        self._tell("none", "no action is possible", found)

    def _take(
        self, action: str, trainer: L.Trainer, pl_module: L.LightningModule, found: dict[str, Rise]
    ) -> str | None:
        """Takes one action; returns what it did in words, and None if it is not possible here."""
        if action == "lr":
            return self._remedies.halve_lr(trainer)
        if action == "replay":
            return self._remedies.raise_replay(trainer)
        if action == "stop":
            trainer.should_stop = True
            return f"training of {self.run.position.name} ends"
        if action == "interpolate":
            share = interpolate_back(pl_module, self._safe, lambda: self._excess(trainer, pl_module, list(found)))
            return None if share is None else f"{share:.0%} of the way from the last safe weights is left"
        return "no other action"

    def _excess(self, trainer: L.Trainer, pl_module: L.LightningModule, names: list[str]) -> float:
        rises = [self._measure(trainer, pl_module, name, 0.5)[0] for name in names]
        worst: float = trainer.strategy.broadcast(max(rise.excess for rise in rises))
        return worst

    def _roll_back(self, trainer: L.Trainer, found: dict[str, Rise]) -> None:
        """Leaves the fit for the last safe checkpoint; what the guard has seen, and done, is carried along."""
        assert self._snapshot is not None
        self._remedies.pending = True  # what follows is applied when the checkpoint is loaded
        words, end = [f"back to {self._snapshot.name}"], False
        names = ["rollback"]
        while self._rung < len(self.action):
            action = self.action[self._rung]
            self._rung += 1
            done = {"lr": self._remedies.halve_lr, "replay": self._remedies.raise_replay}.get(action)
            told = done(trainer) if done is not None else None
            end = action == "stop"
            if told is not None or end or action == "warn":
                names.append(action)
                words.append(told or ("the task ends there" if end else "the same training once more"))
                break
        else:
            names, words, end = [*names, "stop"], [*words, "the task ends there"], True
        self._tell(", ".join(names), ", ".join(words), found)
        self._carried = self._own_state()
        TaskCoordinator.of(trainer).go_back(trainer, self._snapshot, end)

    def _tell(self, action: str, words: str, found: dict[str, Rise]) -> None:
        due = [name for name in found if self._breaches[name] >= self.patience]
        for entry in self.looks[-len(found) :]:
            if entry["task"] in due:
                entry["action"] = action
        rises = ", ".join(
            f"{name} {found[name].mean:+.3g} ± {found[name].rise_margin:.2g} nats, allowed {found[name].allowed:.3g}"
            for name in due
        )
        self._breaches = {}
        tell = rank_zero_warn if action in ("warn", "none") else rank_zero_info
        tell(f"{type(self).__name__}, {self.task}, step {self._step}: {rises}: {words}")

    # ------------------------------------------------------------------ state and report

    def _own_state(self) -> dict[str, Any]:
        """Returns what the guard has seen and done, without the position in training that it belongs to."""
        return {
            "entries": [dict(entry) for entry in self.looks],
            "looks": self._look_number,
            "rung": self._rung,
            "breaches": dict(self._breaches),
            "remedies": self._remedies.state(),
            "seconds": self.seconds,
        }

    @override
    def continual_state(self) -> dict[str, Any]:
        return self._own_state() | {
            "sets": self.sets.state(),
            "schedule": self._schedule.state() if self._schedule is not None else None,
            "step": self._step,
            "safe": on_cpu(self._safe),
            "snapshot": str(self._snapshot) if self._snapshot is not None else None,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.sets.load(state["sets"])
        self._schedule = Schedule(**state["schedule"]) if state["schedule"] is not None else None
        self._step, self._safe = state["step"], dict(state["safe"])
        self._snapshot = Path(state["snapshot"]) if state["snapshot"] is not None else None
        carried, self._carried = self._carried, None
        own = state if carried is None else carried
        self.looks, self._look_number = [dict(entry) for entry in own["entries"]], own["looks"]
        self._rung, self._breaches, self.seconds = own["rung"], dict(own["breaches"]), own["seconds"]
        self._remedies.load(own["remedies"])
        if carried is not None:
            self._remedies.went_back(state["remedies"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self._safe)

    @override
    def report(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "unit": self.unit,
            "confidence": self.confidence,
            "looks": self._look_number,
            "seconds": self.seconds,
            "sections": {"guard": [dict(entry) for entry in self.looks], "budget": final_decisions(self)},
            "sentences": guard_sentences(self),
        }
