"""The matrix of every task after every task, and the run's report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.callbacks.monitoring.earlier_rows import earlier_boundary
from lightning_cl.callbacks.monitoring.task_metrics import TaskMetrics
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Need
from lightning_cl.core.run_state import named
from lightning_cl.data.measured_on import difference, measured_on
from lightning_cl.data.module import TaskDataModule
from lightning_cl.evaluation import build_report, format_report, write_report
from lightning_cl.evaluation.figure import matrix_figure, write_importance
from lightning_cl.evaluation.reference import check_reference, on_other_data, read_reference
from lightning_cl.evaluation.scores import score_fingerprints, score_matrix
from lightning_cl.evaluation.sentences import Method
from lightning_cl.evaluation.to_loggers import log_evidence
from lightning_cl.functional.retention import Mode, Preset, check_preset, with_worst
from lightning_cl.passes.passes import progress


class TaskMatrix(ContinualCallback):
    """Evaluates every task before training and after every task, under :func:`~lightning_cl.fit_tasks`.

    Each entry is what the module logs under `monitor` in ``trainer.validate`` with that task's validation data. If a
    run continues with other validation data (or other batches of it), rows are measured again if their checkpoints
    still exist: the one that the run resumes from, and those in the same folder. A line separates the rows that are
    left, and no score compares rows across it. A score that is NaN or infinite counts as the worst and is named. After
    every task the run's folder gets ``report.json``, ``matrix.csv`` and ``matrix.png``; at the end it gets
    ``report.html``, a page to send to others, and the table is printed.

    A task with ``Task(metrics=[…])`` is also asked for answers, by the model that its user would get: each metric has a
    matrix of its own, with its scores (``summary()["metrics"]``), in the report and in ``matrix_<metric>.csv``. The
    matrix ``main`` has each task by the first of its metrics.

    Memory: none; with metrics, the answers as text. Compute: one validation of every task before training and after
    every task; with metrics, as often the writing of `metric_samples` answers of each task.

    Args:
        monitor: the name of the logged metric.
        mode: ``min`` if lower is better (a loss), ``max`` if higher is (an accuracy).
        preset: whose definition of transfer: ``gem``, ``trace`` or ``sapt`` (which needs `reference`), see
            :mod:`lightning_cl.functional.retention`.
        reference: the score that each task can reach, for intransigence and for the forward transfer of ``sapt``: for
            each trained task a number, or the folder of a run whose last row has it. One folder stands for all tasks:
            that of a run on all data together.
        metric_samples: the most samples of a task that its metrics are measured on, the same ones each time; None: all.
        metric_split: ``val`` or ``test``: the data that the metrics are measured on.

    Attributes:
        matrix: ``[rows, tasks]``: row 0 is before any training, row i after the i-th trained task; one column for each
            task, the watched ones too. What was never measured is NaN; what was measured and is not finite is the
            worst: ``inf`` in mode ``min``, ``-inf`` in mode ``max``.
        tasks: the names of the columns.
        measured_on: for each task, what its column is measured on (:mod:`lightning_cl.data.measured_on`).
        changes: one entry for each change of that data: ``task``, ``row`` (the first one on the new data), ``what``
            differs, and ``before``, the values of that row and later rows on the old data (None: not measured).

    Raises:
        ValueError: if mode or preset is none of the above, or a trained task has no reference while others have, or
            ``sapt`` needs it.
        FileNotFoundError: if a run that is named as a reference has no ``report.json``.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import TaskMatrix
        >>> matrix = TaskMatrix(monitor="val_loss")
        >>> trainer = L.Trainer(callbacks=[matrix], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> matrix.monitor
        'val_loss'
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Mode = "min",
        preset: Preset = "gem",
        reference: dict[str, float | str] | str | None = None,
        metric_samples: int | None = 100,
        metric_split: Literal["val", "test"] = "val",
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.mode: Mode = check_choice("mode", mode, ("min", "max"))  # type: ignore[assignment]
        check_preset(preset)
        self.preset: Preset = preset
        self._reference = read_reference(reference) if reference is not None else {}
        self.matrix = torch.empty(0, 0)
        self.tasks: list[str] = []
        self.watched: list[str] = []
        self.on_training_data: list[str] = []
        self.measured_on: dict[str, dict[str, Any]] = {}
        self.changes: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._task_metrics = TaskMetrics(metric_samples, metric_split)
        self._methods: Sequence[tuple[Method, str]] = []  # of the run, for the picture
        self.last_report: dict[str, Any] | None = None  # as report.json has it, after the last task so far

    boundary_order = -1  # its evaluation builds the model, which others need

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"TaskMatrix(monitor={self.monitor!r}): {type(pl_module).__name__} has no validation_step to measure"
                " it in"
            )
        if trainer.limit_val_batches == 0:
            raise MisconfigurationException(
                "TaskMatrix: Trainer(limit_val_batches=0) leaves nothing to measure; give a limit above 0, or none"
            )

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        check_reference(self._reference, self.run.names, self.preset == "sapt")

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.run.data is None:
            rank_zero_warn("TaskMatrix measures between tasks, under lightning_cl.fit_tasks only: this is a plain fit")

    @override
    def on_sequence_start(self) -> None:
        self.matrix, self.tasks, self.seconds = torch.empty(0, 0), [], 0.0
        self.measured_on, self.changes = {}, []
        self.last_report = None
        self._task_metrics.clear()

    @override
    def at_boundary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        ckpt_path: str | None = None,
    ) -> None:
        if trainer.fast_dev_run and trained > 0:  # type: ignore[attr-defined]
            return  # that it can be measured was seen before the first task
        start, source = time.monotonic(), ckpt_path
        self._grow(data, trained)
        unknown = [column for column in range(len(self.tasks)) if self.matrix[trained, column].isnan()]
        when = f"after task {trained}/{len(data.trained_tasks)}" if trained else "before training"
        for column in progress(trainer, unknown, f"Evaluating all tasks {when}"):
            self.matrix[trained, column] = self._evaluate(trainer, pl_module, data, column, ckpt_path)
            ckpt_path = None  # the weights are in the module now
        if ckpt_path is not None:
            # Nothing was to be measured: one evaluation, to see if the data is still what the rows were measured on.
            self._evaluate(trainer, pl_module, data, 0, ckpt_path)
        changed = self._changed(trainer, data, trained)
        if changed:
            again = [column for column in changed if column not in unknown]
            old = self._measure_again(trainer, pl_module, data, trained, again, source)
            self._tell_change(changed, again, old, trained)
        diverged = [name for name, value in zip(self.tasks, self.matrix[trained], strict=True) if value.isinf()]
        if diverged:
            rank_zero_warn(
                f"TaskMatrix: {self.monitor} of {', '.join(diverged)} is not finite {when}: it counts as the worst"
            )
        if unknown:
            self.on_training_data = [task.name for task in data.tasks if data.validated_on_training_data(task)]
        self._task_metrics.measure(trainer, pl_module, data, trained)
        self.seconds += time.monotonic() - start
        self._log(trainer, trained)

    def _grow(self, data: TaskDataModule, trained: int) -> None:
        """Columns for new tasks and a row for this boundary; what was not measured stays unknown."""
        names = [task.name for task in data.tasks]
        matrix = torch.full((max(trained + 1, len(self.matrix)), len(names)), torch.nan, dtype=torch.float64)
        for column, name in enumerate(names):
            if name in self.tasks:
                matrix[: len(self.matrix), column] = self.matrix[:, self.tasks.index(name)]
        self.matrix, self.tasks = matrix, names
        self.watched = [task.name for task in data.tasks if task.watched]

    def _changed(self, trainer: L.Trainer, data: TaskDataModule, trained: int) -> dict[int, str]:
        """Columns whose data is not what their earlier rows were measured on, with what differs."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return {}  # one batch of everything: no results
        limit = trainer.limit_val_batches
        now = {task.name: measured_on(data, task, limit, trainer.world_size) for task in data.tasks}
        now = trainer.strategy.broadcast(now)  # all ranks must measure the same columns
        unknown = not self.measured_on and bool((~self.matrix[:-1].isnan()).any())
        found = {}
        for column, name in enumerate(self.tasks):
            what = difference(self.measured_on[name], now[name]) if name in self.measured_on else None
            if what is not None:
                found[column] = what
        self.measured_on |= now
        if trained == 0:
            for words in on_other_data(self._reference, now):
                rank_zero_warn(f"TaskMatrix: {words}")
        if unknown:
            rank_zero_warn(
                "TaskMatrix: the checkpoint, of an earlier version, does not say on what data its rows were measured;"
                " it is taken for the same as now"
            )
        return found

    def _measure_again(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        columns: list[int],
        source: str | None,
    ) -> dict[int, list[float | None]]:
        """Measures known entries on other data: of this row, and of rows whose weights lie next to `source`.

        Returns:
            for each row that is on the new data now, what the columns were before.
        """
        old = self.matrix.clone()
        weights: dict[int, str | None] = {}
        names = [task.name for task in data.trained_tasks]
        checkpoint = Path(source or ".")
        for row in range(trained - 1, 0, -1) if source is not None and columns else ():
            found = earlier_boundary(checkpoint, row, names, self.tasks, old) if trainer.is_global_zero else None
            path = trainer.strategy.broadcast(found)
            if path is None:
                break  # what lies before it stays on the other side of the line
            weights[row] = path
        for row, path in [*weights.items(), (trained, source if weights else None)]:
            for column in columns:
                if row == trained or not old[row, column].isnan():
                    self.matrix[row, column] = self._evaluate(trainer, pl_module, data, column, path)
                    path = None  # the module has them now
        return {row: [_known(float(value)) for value in old[row]] for row in sorted([*weights, trained])}

    def _tell_change(
        self, changed: dict[int, str], again: list[int], old: dict[int, list[float | None]], trained: int
    ) -> None:
        """Keeps where the data changed, and warns."""
        for column, what in changed.items():
            before = [values[column] for values in old.values()] if column in again else []
            self.changes.append({"task": self.tasks[column], "row": min(old), "what": what, "before": before})
        names = ", ".join(f"{self.tasks[column]} ({what})" for column, what in changed.items())
        rank_zero_warn(
            f"TaskMatrix: measured on other data than in the run before: {names}. Rows {min(old)} to {trained} are on"
            " the new data; a line separates the rows before, and no score is made across it"
        )

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, column: int, ckpt_path: str | None
    ) -> float:
        bar, loggers = trainer.progress_bar_callback, trainer.loggers
        modes = {module: module.training for module in pl_module.modules()}
        # The user's curves of the current task's validation are not to be mixed with these.
        trainer.loggers = [DummyLogger() for _ in loggers]
        shown = bar is not None and getattr(bar, "is_enabled", True)
        if bar is not None and shown:
            bar.disable()
        try:
            with data.showing(data.tasks[column]):
                trainer.validate(pl_module, datamodule=data, ckpt_path=ckpt_path, verbose=False)
        finally:
            trainer.loggers = loggers
            if bar is not None and shown:
                bar.enable()
            for module, training in modes.items():
                module.training = training
        if self.monitor not in trainer.callback_metrics and data.val_loader(data.tasks[column]) is None:
            raise MisconfigurationException(
                f"task {data.tasks[column].name!r}: there is nothing to measure it on: give Task(val=…), one loader or"
                " data set"
            )
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"TaskMatrix(monitor={self.monitor!r}): {type(pl_module).__name__} logs no such metric in validation;"
                f" it logs {sorted(trainer.callback_metrics)}"
            )
        value = trainer.callback_metrics[self.monitor].to(trainer.strategy.root_device, torch.float64)
        # A metric logged without sync_dist is each rank's own.
        return float(with_worst(trainer.strategy.reduce(value, reduce_op="mean"), self.mode))

    def _log(self, trainer: L.Trainer, trained: int) -> None:
        metrics = {
            f"continual/{self.monitor}/{name}": float(value)
            for name, value in zip(self.tasks, self.matrix[trained], strict=True)
            if not value.isnan()
        }
        metrics |= self._task_metrics.logged(self.tasks, trained)
        if trained > 0:
            metrics |= {
                f"continual/{name}": value
                for name, value in self.summary().items()
                if isinstance(value, float) and value == value
            }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @override
    def after_boundary(self, trainer: L.Trainer, trained: int, final: bool) -> None:
        if trained == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # one batch is no result
        methods = self._methods = named(self.run.methods)
        report = self.last_report = build_report(self, self.run.costs, methods)
        folder = run_folder(trainer)  # asked on all ranks
        if trainer.is_global_zero:
            write_report(report, folder, page=final)
            write_importance(report, folder)
            log_evidence(trainer.loggers, report, trainer.global_step)
        if final:
            rank_zero_info(format_report(report, folder))

    # ------------------------------------------------------------------ what others read

    @override
    def advice(self, need: Need) -> str | None:
        if need != "begin":
            return None
        return "Replay(ratio=0.05), 0.25 for tasks this different; without stored data, EWC or SelfReplay"

    def trained_matrix(self) -> Tensor:
        """Returns the matrix for scores: no watched tasks, NaN where a row was measured on other data than the last."""
        comparable = self.matrix.clone()
        for change in self.changes:
            if change["task"] in self.tasks:
                comparable[: change["row"], self.tasks.index(change["task"])] = torch.nan
        return comparable[:, [i for i, name in enumerate(self.tasks) if name not in self.watched]]

    def summary(self, preset: Preset | None = None) -> dict[str, Any]:
        """The scores, each with its definition.

        Args:
            preset: whose definitions; None: those of the callback. The matrix is the same for all of them.

        Returns:
            the scores (floats, NaN where nothing is known, infinite where the run diverged), for each of them a
            sentence in ``definitions`` and a hash of what it was measured on in ``fingerprints``, ``worst`` and
            ``kept`` (see :func:`~lightning_cl.evaluation.scores.score_matrix`), ``reference``, ``tasks``, ``matrix`` (a
            list of rows), ``not_finite`` (the ``task`` and ``row`` of each such entry), and settings of the callback.
            If tasks have metrics, ``metrics`` too: ``scores`` (for each metric the same scores, ``matrix`` and
            ``standard_errors``), ``definitions``, ``tasks``, ``costs``, ``answers`` and ``changes``.

        Raises:
            ValueError: if there is no such preset, or ``sapt`` is asked for without a `reference` for each task.
        """
        chosen = self.preset if preset is None else preset
        check_preset(chosen)
        matrix, trained = self.trained_matrix(), [name for name in self.tasks if name not in self.watched]
        reference = {name: self._reference[name]["score"] for name in trained if name in self._reference}
        reference = reference if len(reference) == len(trained) else {}
        if preset == "sapt" and not reference:
            raise ValueError(
                "summary(preset='sapt'): it compares with a model trained on each task alone; give reference="
            )
        scores = score_matrix(matrix, trained, self.mode, chosen, reference)
        settings = {"monitor": self.monitor, "mode": self.mode, "preset": chosen}
        known = trained[: max(0, len(matrix) - 1)]
        if self._task_metrics.asked:
            scores["metrics"] = self._task_metrics.summary(self.tasks, self.watched, len(self.matrix), chosen)
        return scores | {
            "fingerprints": score_fingerprints(
                list(scores["definitions"]), known, self.measured_on, settings, reference
            ),
            "reference": {name: dict(self._reference[name]) for name in reference},
            "preset": chosen,
            "monitor": self.monitor,
            "mode": self.mode,
            "tasks": list(self.tasks),
            "watched": list(self.watched),
            "measured_on_training_data": list(self.on_training_data),
            "measured_on": {name: dict(self.measured_on[name]) for name in self.tasks if name in self.measured_on},
            "data_changes": [dict(change) for change in self.changes if change["task"] in self.tasks],
            "not_finite": [
                {"task": self.tasks[column], "row": row} for row, column in self.matrix.isinf().nonzero().tolist()
            ],
            "matrix": self.matrix.tolist(),
        }

    def plot(self) -> Any:
        """Draws what was measured so far, as ``matrix.png`` has it.

        Returns:
            a ``matplotlib.figure.Figure``: a notebook shows it, and ``savefig`` writes it.

        Raises:
            RuntimeError: if nothing has been measured yet.
        """
        if not len(self.matrix):
            raise RuntimeError("TaskMatrix.plot(): nothing has been measured yet; it measures under fit_tasks")
        report = build_report(self, [], self._methods)
        return matrix_figure(report, None if self._methods else self.monitor)

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix.clone(),
            "tasks": list(self.tasks),
            "on_training_data": list(self.on_training_data),
            "measured_on": {name: dict(on) for name, on in self.measured_on.items()},
            "changes": [dict(change) for change in self.changes],
            "seconds": self.seconds,
            **({"task_metrics": self._task_metrics.state()} if self._task_metrics.asked else {}),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.matrix, self.tasks, self.seconds = state["matrix"].clone(), list(state["tasks"]), state["seconds"]
        self.on_training_data = list(state["on_training_data"])
        # Earlier checkpoints do not have them, and keep NaN where something was measured and was not finite.
        self.measured_on = {name: dict(on) for name, on in state.get("measured_on", {}).items()}
        self.changes = [dict(change) for change in state.get("changes", [])]
        self._task_metrics.load(state.get("task_metrics"))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
