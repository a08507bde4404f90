"""A test of what is hidden and what is gone: a few steps on an earlier task, from a copy of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer, check_positive
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Trait
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.evaluation.tables import format_number
from lightning_cl.passes.held_out import FixedSamples, held_out_loader, mean_losses, same_on_all_ranks
from lightning_cl.passes.passes import leaving_no_trace
from lightning_cl.passes.relearning import peak_rates, thrown_away, train_steps
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import Task

_FORGOTTEN = 0.005  # nats: a smaller rise has no share that could be recovered


class RecoveryProbe(ContinualCallback):
    """Measures how much of what seems lost comes back in a few steps ("spurious forgetting", arXiv:2501.13453).

    At the end of the sequence (or of each task), for each earlier task, `steps` training steps are made on a few of its
    training samples, from a copy of the weights that is thrown away::

        recovered share = (loss now − loss after the steps) / (loss now − loss when it was learnt)

    A model that has truly lost a task also learns it again. So there is a control: the same steps on the same samples
    when the task began, before it was learnt. The control's share is of what the task's training gave::

        control's share = (loss before the task − loss after the steps) / (loss before the task − loss when learnt)

    A loss after the steps that is far below the control's says that a part was hidden rather than gone. It is an upper
    bound of that part: what the model has learnt from other tasks since helps it, too. All losses are those
    of ``training_step`` on held-out samples, in evaluation mode. The steps use a fresh optimizer of the run's class, at
    the constant learning rate that the task's own schedule had as its base, without dropout, penalties and replay.
    Training stays the same, bit for bit.

    Memory: two copies of the trainable parameters, and the fresh optimizer's state, during a probe. Compute: `steps`
    training steps at the beginning of each task, and for each earlier task at the end; with ``when="every task"`` at
    the end of each task.

    Args:
        steps: number of steps.
        samples: number of the earlier task's training samples, which the steps go through again and again.
        held_out: number of samples that the losses are measured on.
        batch_size: samples of a step; default: those of the task's loader on all ranks.
        lr: learning rate of the steps; default: as above.
        when: ``end``: at the end of the last task. ``every task``: at the end of each.
        seed: seed for the choice of samples.

    Attributes:
        results: for each task at whose end was probed, the results of each earlier task: ``learnt``, ``now``,
            ``after``, ``forgotten``, ``share``, and ``control`` with ``before``, ``after`` and ``share``. A share is
            None where less than 0.005 was lost or learnt; the control is None if the probe was not there at that time.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import RecoveryProbe
        >>> probe = RecoveryProbe(steps=5, samples=16)
        >>> trainer = L.Trainer(callbacks=[probe], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> probe.results
        {}
    """

    relies_on: frozenset[Trait] = frozenset({"shared parameters"})
    ends_long = True

    def __init__(
        self,
        steps: int = 10,
        samples: int = 32,
        held_out: int = 32,
        batch_size: int | None = None,
        lr: float | None = None,
        when: Literal["end", "every task"] = "end",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.steps = check_integer("steps", steps, 1)
        self.samples = check_integer("samples", samples, 1)
        self.held_out = check_integer("held_out", held_out, 1)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size, 1)
        self.lr = None if lr is None else check_positive("lr", lr)
        self.when = check_choice("when", when, ("end", "every task"))
        self.seed = check_integer("seed", seed)
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        self.seconds = 0.0
        self._begun: dict[str, dict[str, Any]] = {}  # for each task, the control and its learning rates
        self._learnt: dict[str, float] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: steps from a copy of the weights do not work with")

    @override
    def on_sequence_start(self) -> None:
        self.results, self._begun, self._learnt, self.seconds = {}, {}, {}, 0.0

    # ------------------------------------------------------------------ when

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = self.run.data
        if data is None:
            rank_zero_warn("RecoveryProbe needs earlier tasks' data, under lightning_cl.fit_tasks: this is a plain fit")
            return
        rates = peak_rates(trainer.optimizers[0])
        if self.lr is not None:
            rates = [self.lr] * len(rates)
        task = data.current
        probed = self._probe(trainer, pl_module, task, rates)
        if probed is not None:
            before, after = probed
            self._begun[task.name] = {"before": before, "after": after, "rates": rates}

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = self.run.data
        if data is None:
            return
        task, last = data.current, data.index + 1 == len(data.trained_tasks)
        with leaving_no_trace(pl_module):
            learnt = self._measure(trainer, pl_module, task)
        if learnt is not None:
            self._learnt[task.name] = learnt
        if not last and self.when == "end":
            return
        for earlier in data.trained_tasks[: data.index]:
            if earlier.name in self._learnt:
                self._test(trainer, pl_module, earlier, task.name)

    def _test(self, trainer: L.Trainer, pl_module: L.LightningModule, earlier: Task, now_at: str) -> None:
        """Probes one earlier task at the end of the task `now_at`."""
        control = self._begun.get(earlier.name)
        rates = control["rates"] if control is not None else peak_rates(trainer.optimizers[0])
        if len(rates) != len(trainer.optimizers[0].param_groups):
            rates = [rates[0]] * len(trainer.optimizers[0].param_groups)
        probed = self._probe(trainer, pl_module, earlier, rates)
        if probed is None:
            return
        now, after = probed
        learnt = self._learnt[earlier.name]
        found: dict[str, Any] = {"learnt": learnt, "now": now, "after": after, "forgotten": now - learnt}
        found["share"] = _share(now, after, learnt)
        found["control"] = None
        if control is not None:
            before, anew = control["before"], control["after"]
            found["control"] = {"before": before, "after": anew, "share": _share(before, anew, learnt)}
        self.results.setdefault(now_at, {})[earlier.name] = found
        for logger in trainer.loggers:
            logger.log_metrics({f"continual/recovery/{earlier.name}": after}, step=trainer.global_step)

    # ------------------------------------------------------------------ a probe

    def _probe(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: Task, rates: Sequence[float]
    ) -> tuple[float, float] | None:
        """Returns a task's held-out loss now and after the steps; None where its data does not allow it."""
        assert self.run.data is not None
        with untouched_random_state():
            loader = self.run.data.train_loader(task)
        if why_not_plannable(loader) is not None:
            return None
        start = time.monotonic()
        quick = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        with thrown_away(pl_module):
            before = self._measure(trainer, pl_module, task)
            if before is None:
                return None
            count = 1 if quick else self.samples
            batches = same_on_all_ranks(trainer, loader, count, self.seed, self._rows(trainer, loader))
            train_steps(trainer, pl_module, batches, 1 if quick else self.steps, rates)
            after = self._measure(trainer, pl_module, task)
            assert after is not None
        self.seconds += time.monotonic() - start
        return before, after

    def _rows(self, trainer: L.Trainer, loader: Any) -> int:
        """Returns the number of samples of a step."""
        if self.batch_size is not None:
            return self.batch_size
        size = getattr(loader, "batch_size", None)
        return (size if isinstance(size, int) else 8) * trainer.world_size

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, task: Task) -> float | None:
        """Returns the held-out loss of a task; None if there is nothing to measure it on."""
        assert self.run.data is not None
        loader = held_out_loader(self.run.data, task)
        if loader is None:
            return None
        count = 1 if trainer.fast_dev_run else self.held_out  # type: ignore[attr-defined]
        samples = FixedSamples(trainer, loader, count, self.seed, f"{type(self).__name__}: {task.name}")
        return dict(mean_losses(trainer, pl_module, {task.name: samples}))[task.name]

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "results": {at: {name: _copy(found) for name, found in r.items()} for at, r in self.results.items()},
            "begun": {name: {**kept, "rates": list(kept["rates"])} for name, kept in self._begun.items()},
            "learnt": dict(self._learnt),
            "seconds": self.seconds,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.results = {at: {name: _copy(found) for name, found in r.items()} for at, r in state["results"].items()}
        self._begun = {name: {**kept, "rates": list(kept["rates"])} for name, kept in state["begun"].items()}
        self._learnt, self.seconds = dict(state["learnt"]), state["seconds"]

    @override
    def report(self) -> dict[str, Any]:
        settings = {"steps": self.steps, "samples": self.samples, "held_out": self.held_out}
        if not self.results:
            return settings
        last = list(self.results.values())[-1]
        section = {**settings, "seconds": self.seconds, "after": self.results}
        sentences = [words for name, found in last.items() if (words := self._sentence(name, found))]
        return {**settings, "sections": {"recovery": section}, "sentences": sentences}

    def _sentence(self, name: str, found: dict[str, Any]) -> str | None:
        if not math.isfinite(found["now"]):
            return f"{name}: its loss is not finite now, and {self.steps} steps led to {format_number(found['after'])}"
        if found["share"] is None:
            now, learnt = format_number(found["now"]), format_number(found["learnt"])
            return f"{name}: nothing to recover: {now} now, {learnt} when learnt"
        control = found["control"]
        brought = "all, and more," if found["share"] > 1 else f"{found['share']:.0%}"
        words = (
            f"{name}: {self.steps} steps on {self.samples} of its samples bring back {brought} of what seems"
            f" lost ({format_number(found['now'])} now, {format_number(found['after'])} after them,"
            f" {format_number(found['learnt'])} when learnt)"
        )
        if control is None:
            return words
        return f"{words}; the same steps before it was learnt led to {format_number(control['after'])}"


def _share(start: float, after: float, learnt: float) -> float | None:
    """Returns the part of ``start − learnt`` that the steps brought; None if there is next to nothing to bring."""
    whole = start - learnt
    return (start - after) / whole if whole >= _FORGOTTEN else None


def _copy(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "control": None if found["control"] is None else dict(found["control"])}
