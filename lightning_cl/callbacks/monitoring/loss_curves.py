"""The held-out loss of every earlier task while the next ones are trained."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.arguments import check_integer, is_integer
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.deployment import deployed
from lightning_cl.core.loops import steps_of_current_task
from lightning_cl.core.method import ContinualCallback
from lightning_cl.evaluation.curves import curve_sentences, describe_switches, geometric_looks
from lightning_cl.evaluation.curves_figure import write_curves
from lightning_cl.passes.held_out import FixedSamples, held_out_loader, mean_losses
from lightning_cl.passes.passes import leaving_no_trace

_SHARE = 0.02  # of a task's compute
_PASSES = 3  # forward passes that a training step on the same samples is worth
_FEWEST_SAMPLES, _FEWEST_LOOKS, _MOST_LOOKS = 4, 3, 48
_UNKNOWN = 500  # steps of a task whose number of steps nobody knows


class LossCurves(ContinualCallback):
    """Measures the loss of every earlier task during the training of the next ones, under ``fit_tasks``.

    The matrix looks at the end of a task only. Right after a switch the loss of earlier tasks may rise steeply and fall
    again: the stability gap (De Lange, van de Ven & Tuytelaars 2023, ICLR, arXiv:2205.13452). The report has its depth
    and the steps until 90 % of it has gone, for each earlier task and each switch
    (:func:`~lightning_cl.evaluation.curves.stability_gap` has the definition).

    A look is the loss of ``training_step`` in evaluation mode, on the same few validation samples each time (without
    validation data: training samples). It covers the task that is trained, the tasks before it and the watched ones.
    Looks come after step 1, 2, 3, 5, … of a task, at ever longer distances, and at its end. The loss of a task whose
    parameters later tasks do not touch (``TaskAdapters``, ``PackNet``) is that of its own parameters; watched tasks are
    left out there. Training stays the same, bit for bit, and so do its metrics. The run's folder gets ``curves.png``.

    Memory: the samples, on the device; the numbers, in checkpoints. Compute: with ``every="auto"`` at most 2 % of a
    task's training, counted as three forward passes for a training step. Runs too short for that get three looks at
    four samples. The report has the measured time.

    Args:
        every: ``auto``, or the number of steps from one look to the next.
        samples: number of samples of each task; ``auto`` takes fewer (at least 4) in short runs, and the same number
            for the whole run.
        seed: seed for the choice of samples.

    Attributes:
        curves: task name to a list of ``[step of the run, loss]``; a loss that is not finite stays as it is.
        switches: each task that began, with its name (``task``) and the ``step`` of the run.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import LossCurves
        >>> curves = LossCurves(every=50, samples=16)
        >>> trainer = L.Trainer(callbacks=[curves], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> curves.curves
        {}
    """

    def __init__(self, every: int | Literal["auto"] = "auto", samples: int = 32, seed: int = 0) -> None:
        super().__init__()
        if every != "auto" and not is_integer(every, 1):
            raise ValueError(f"every={every!r}: expected a positive number of steps, or 'auto'")
        check_integer("samples", samples, 1)
        check_integer("seed", seed)
        self.every, self.samples, self.seed = every, samples, seed
        self.curves: dict[str, list[list[float]]] = {}
        self.switches: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._count: int | None = None  # samples of each task, the same in the whole run
        self._looks: list[int] = []  # steps of the current task that are still to be looked at, with `auto`
        self._last_step = 0
        self._samples: dict[str, FixedSamples] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: a forward pass between two steps does not work with")

    @override
    def on_sequence_start(self) -> None:
        self.curves, self.switches, self.seconds, self._count, self._looks = {}, [], 0.0, None, []

    # ------------------------------------------------------------------ when

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.run.data is None:
            rank_zero_warn("LossCurves looks at earlier tasks under lightning_cl.fit_tasks only: this is a plain fit")
            return
        assert self.task is not None
        self.switches.append({"task": self.task.name, "step": trainer.global_step})
        self._plan(trainer)

    def _plan(self, trainer: L.Trainer) -> None:
        """Chooses the steps to look at in this task, and in the first one the number of samples."""
        assert self.run.data is not None
        assert self.task is not None
        if self.every != "auto":
            self._count = self.samples
            return
        steps = steps_of_current_task(trainer, self.run.limits)
        size = getattr(trainer.train_dataloader, "batch_size", None)
        batch = (size if isinstance(size, int) else 8) * trainer.accumulate_grad_batches * trainer.world_size
        affordable = _SHARE * _PASSES * (steps or _UNKNOWN) * batch  # samples to look at, of all tasks
        watched = sum(task.watched for task in self.run.data.tasks)
        if self._count is None:
            each = affordable / (len(self.run.data.trained_tasks) + watched)
            self._count = min(self.samples, max(_FEWEST_SAMPLES, round(math.sqrt(2 * each))))
        looks = int(affordable / (self._count * (self.task.index + 1 + watched)))
        looks = min(_MOST_LOOKS, max(_FEWEST_LOOKS, looks))
        self._looks = geometric_looks(steps, looks - 1) if steps else geometric_looks(10**8, _MOST_LOOKS)

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, self._samples = self.run.data, {}
        if data is None or self._count is None:
            return
        assert self.task is not None
        begun = data.trained_tasks[: self.task.index + 1]
        count = 1 if trainer.fast_dev_run else self._count  # type: ignore[attr-defined]
        with leaving_no_trace(pl_module):
            for task in data.tasks:
                if (task.watched and not self._apart) or any(task is one for one in begun):
                    loader = held_out_loader(data, task)
                    if loader is not None:
                        label = f"{type(self).__name__}: {task.name}"
                        self._samples[task.name] = FixedSamples(trainer, loader, count, self.seed, label)
        # What was measured at the end of the task before has not changed since.
        step = trainer.global_step
        if self.switches[-1]["step"] == step:
            self._look(trainer, pl_module, step, [n for n in self._samples if self._step_of(n) != step])

    @property
    def _apart(self) -> bool:
        """True if each task has parameters of its own: an earlier task is not the model that is trained."""
        return any("shared parameters" in method.takes_away for method in self.run.methods)

    def _step_of(self, name: str) -> int | None:
        return int(self.curves[name][-1][0]) if self.curves.get(name) else None

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not self._samples:
            return
        step = trainer.global_step + 1  # Lightning counts this step when the hook has returned
        own = step - self.run.first_step
        if isinstance(self.every, int):
            due = own % self.every == 0
        else:
            due = bool(self._looks) and own >= self._looks[0]
            self._looks = [look for look in self._looks if look > own]
        if due:
            self._look(trainer, pl_module, step, list(self._samples))

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module, trainer.global_step, list(self._samples))
        self._samples = {}

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._samples = {}

    # ------------------------------------------------------------------ looks

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int, names: list[str]) -> None:
        """Measures these tasks, and keeps and logs the losses."""
        self._last_step = step
        if not names:
            return
        start = time.monotonic()
        assert self.task is not None
        earlier = [name for name in names if self._apart and name != self.task.name]
        as_they_are = {name: self._samples[name] for name in names if name not in earlier}
        losses: dict[str, float] = {}
        with leaving_no_trace(pl_module):
            if as_they_are:
                losses |= mean_losses(trainer, pl_module, as_they_are)
            for name in earlier:
                with deployed(trainer, pl_module, name):
                    losses |= mean_losses(trainer, pl_module, {name: self._samples[name]})
        for name, loss in losses.items():
            points = self.curves.setdefault(name, [])
            if points and points[-1][0] == step:
                points.pop()  # a method has changed the weights since, at the task's end
            points.append([step, loss])
        known = {f"continual/curves/{name}": loss for name, loss in losses.items() if math.isfinite(loss)}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=step)
        self.seconds += time.monotonic() - start

    @override
    def after_boundary(self, trainer: L.Trainer, trained: int, final: bool) -> None:
        folder = run_folder(trainer)  # asked on all ranks
        if trained and self.curves and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_curves(self._described(), folder)

    def _described(self) -> dict[str, Any]:
        return {
            "tasks": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "switches": describe_switches(self.curves, self.switches, self._last_step),
            "samples": self._count,
            "seconds": self.seconds,
        }

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "switches": [dict(switch) for switch in self.switches],
            "seconds": self.seconds,
            "count": self._count,
            "looks": list(self._looks),
            "last_step": self._last_step,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.curves = {name: [list(point) for point in points] for name, points in state["curves"].items()}
        self.switches = [dict(switch) for switch in state["switches"]]
        self.seconds, self._count = state["seconds"], state["count"]
        self._looks, self._last_step = list(state["looks"]), state["last_step"]

    @override
    def report(self) -> dict[str, Any]:
        if not self.curves:
            return {"every": self.every}
        described = self._described()
        return {
            "every": self.every,
            "sections": {"curves": described},
            "sentences": curve_sentences(described["switches"]),
        }
