"""The metrics of each task's answers after every task: a matrix for each metric."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.data.exercises import Exercise, Split, exercises_of, fingerprint_of
from lightning_cl.data.module import TaskDataModule
from lightning_cl.evaluation.scores import score_matrix
from lightning_cl.evaluation.tables import SCORES
from lightning_cl.functional.retention import Preset
from lightning_cl.metrics.text import DEFINITIONS
from lightning_cl.passes.exam import Exam, hold_exam, new_tokens
from lightning_cl.tasks import Task

MAIN = "main"
"""The name of the matrix in which each task has the first of its metrics."""

_SHOWN = 5  # exercises of a task whose answers are in the report


class TaskMetrics:
    """Measures ``Task(metrics=[…])`` between tasks, for :class:`~lightning_cl.TaskMatrix`.

    Memory: the answers to `samples` exercises of each task after every task, as text. Compute: as many answers a task
    after every task.

    Args:
        samples: the most exercises of a task; None: all that there are.
        split: ``val`` or ``test``: the data that the exercises come from.

    Attributes:
        exams: task name to number of trained tasks to the answers and the scores of each exercise.
        asked: task name to what its exercises are: ``metrics``, ``samples``, ``data`` (a hash), ``max_new_tokens``,
            ``prompts``, ``references`` and ``chance`` (of a guess among the choices; None without choices).
        costs: of each measured boundary: ``trained``, ``seconds``, ``generated_tokens``, ``scored_tokens``.
        changes: one entry for each task whose exercises changed in a resumed run: ``task``, ``row``, ``what``.
    """

    def __init__(self, samples: int | None, split: Split) -> None:
        if samples is not None:
            check_integer("metric_samples", samples, 1, "a positive integer, or None for all samples")
        self.samples = samples
        self.split: Split = check_choice("metric_split", split, ("val", "test"))  # type: ignore[assignment]
        self._made: tuple[Any, dict[tuple[str, int | None], list[Exercise]]] = (None, {})
        self.clear()

    def clear(self) -> None:
        """Forgets everything that was measured."""
        self.exams: dict[str, dict[int, dict[str, Any]]] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        self.costs: list[dict[str, float]] = []
        self.changes: list[dict[str, Any]] = []

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, trained: int) -> None:
        """Asks each task with metrics that was not asked at this boundary yet; the module has the right weights."""
        measured = [task for task in data.tasks if task.metrics]
        preflight: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        start, tokens, scored, any_asked = time.monotonic(), 0, 0, False
        for task in measured:
            exercises = self._exercises(data, task, 1 if preflight else self.samples)
            if not exercises:
                raise ValueError(
                    f"task {task.name!r}, metrics={task.metrics}: there is no prompt with an answer in its"
                    f" {self.split} data"
                )
            longest = new_tokens(task, exercises)
            if not preflight:
                self._check_same(task, exercises, longest, trained)
            row = self.exams.get(task.name, {}).get(trained)
            if row is not None and all(metric in row["scores"] for metric in task.metrics or ()):
                continue
            exam = hold_exam(trainer, pl_module, data, task, exercises, 1 if preflight else longest)
            tokens, scored, any_asked = tokens + exam.generated_tokens, scored + exam.scored_tokens, True
            if not preflight:
                self._keep(task, trained, exam)
        if any_asked and not preflight:
            self.costs.append(
                {
                    "trained": trained,
                    "seconds": time.monotonic() - start,
                    "generated_tokens": tokens,
                    "scored_tokens": scored,
                }
            )

    def _exercises(self, data: TaskDataModule, task: Task, most: int | None) -> list[Exercise]:
        """The exercises of a task, made once for a run."""
        if self._made[0] is not data:
            self._made = (data, {})
        made = self._made[1]
        if (task.name, most) not in made:
            made[task.name, most] = exercises_of(data, task, self.split, most)
        return made[task.name, most]

    def _keep(self, task: Task, trained: int, exam: Exam) -> None:
        self.exams.setdefault(task.name, {})[trained] = {
            "answers": exam.answers,
            "scores": exam.scores,
            "cut_off": exam.cut_off,
        }

    def _check_same(self, task: Task, exercises: Sequence[Exercise], longest: int, trained: int) -> None:
        """Forgets a task's earlier answers if they are answers to other exercises, and warns."""
        guesses = [1 / len(one.choices) for one in exercises if one.choices]
        now: dict[str, Any] = {
            "metrics": list(task.metrics or ()),
            "samples": len(exercises),
            "data": fingerprint_of(exercises),
            "split": self.split,
            "max_new_tokens": longest,
            "chance": statistics.fmean(guesses) if guesses else None,
            "prompts": [one.text for one in exercises],
            "references": [list(one.references) for one in exercises],
        }
        then = self.asked.get(task.name)
        self.asked[task.name] = now
        if then is None or task.name not in self.exams:
            return
        what = [
            words
            for key, words in (("data", "the exercises"), ("split", "the split"), ("max_new_tokens", "max_new_tokens"))
            if then[key] != now[key]
        ]
        if not what:
            return
        rows = self.exams.pop(task.name)
        self.changes.append({"task": task.name, "row": trained, "what": ", ".join(what)})
        rank_zero_warn(
            f"TaskMatrix: the metrics of {task.name} are measured on other data than in the run before"
            f" ({', '.join(what)}): its rows {min(rows)} to {max(rows)} are left out"
        )

    # ------------------------------------------------------------------ results

    def names(self) -> list[str]:
        """The metrics that were measured on some task, the main one last."""
        found = {metric for asked in self.asked.values() for metric in asked["metrics"]}
        return [*(metric for metric in DEFINITIONS if metric in found), *([MAIN] if found else [])]

    def matrices(self, metric: str, tasks: Sequence[str], rows: int) -> tuple[Tensor, Tensor]:
        """The matrix of a metric, and the standard error of each of its entries; NaN where nothing was measured.

        Args:
            metric: a metric's name, or ``main``.
            tasks: the columns.
            rows: the number of rows.

        Returns:
            two tensors float64 ``[rows, tasks]``.
        """
        means = torch.full((rows, len(tasks)), torch.nan, dtype=torch.float64)
        errors = means.clone()
        for column, task in enumerate(tasks):
            if task not in self.asked:
                continue
            name = self.asked[task]["metrics"][0] if metric == MAIN else metric
            for row, exam in self.exams.get(task, {}).items():
                scores = exam["scores"].get(name)
                if scores and row < rows:
                    means[row, column] = statistics.fmean(scores)
                    errors[row, column] = (
                        statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else torch.nan
                    )
        return means, errors

    def logged(self, tasks: Sequence[str], row: int) -> dict[str, float]:
        """The entries of one row of all matrices, for loggers."""
        found: dict[str, float] = {}
        for name in self.names():
            entries = zip(tasks, self.matrices(name, tasks, row + 1)[0][row].tolist(), strict=True)
            found |= {f"continual/{name}/{task}": value for task, value in entries if not math.isnan(value)}
        return found

    def summary(self, tasks: Sequence[str], watched: Sequence[str], rows: int, preset: Preset) -> dict[str, Any]:
        """All that the report has: the matrices with their scores, costs, and some answers side by side.

        Args:
            tasks: the columns.
            watched: those of them that are never trained on, and so are in no score.
            rows: the number of rows.
            preset: whose definition of transfer.
        """
        shown = [column for column, name in enumerate(tasks) if name not in watched]
        trained = [tasks[column] for column in shown]
        results = {}
        for name in self.names():
            means, errors = self.matrices(name, tasks, rows)
            results[name] = {
                "mode": "max",
                **_scores(means[:, shown], trained, preset),
                "matrix": means.tolist(),
                "standard_errors": errors.tolist(),
            }
        kept = ("metrics", "samples", "max_new_tokens", "chance", "data")
        totals = ("seconds", "generated_tokens", "scored_tokens")
        return {
            "scores": results,
            "split": self.split,
            "samples": self.samples,
            "tasks": {
                task: {key: asked[key] for key in kept} | {"cut_off": self._cut_off(task)}
                for task, asked in self.asked.items()
            },
            "definitions": {
                name: "each task by the first of its metrics" if name == MAIN else DEFINITIONS[name]
                for name in self.names()
            },
            "costs": {key: sum(cost[key] for cost in self.costs) for key in totals} | {"boundaries": list(self.costs)},
            "changes": [dict(change) for change in self.changes],
            "answers": {task: self._side_by_side(task) for task in self.asked},
        }

    def _cut_off(self, task: str) -> dict[str, int]:
        """After how many trained tasks how many answers were cut off."""
        return {str(row): exam["cut_off"] for row, exam in sorted(self.exams.get(task, {}).items())}

    def _side_by_side(self, task: str) -> list[dict[str, Any]]:
        """A few exercises with their answers after each task: those that became worse since the best row come first."""
        exams, asked = self.exams.get(task, {}), self.asked[task]
        metric = asked["metrics"][0]
        rows = {row: exam for row, exam in sorted(exams.items()) if metric in exam["scores"]}
        if not rows:
            return []
        scores = {row: exam["scores"][metric] for row, exam in rows.items()}
        last = scores[max(scores)]
        loss = [max(each[i] for each in scores.values()) - last[i] for i in range(asked["samples"])]
        chosen = sorted(range(asked["samples"]), key=lambda i: (-loss[i], i))[:_SHOWN]
        return [
            {
                "prompt": asked["prompts"][i],
                "references": asked["references"][i],
                "answers": {str(row): exam["answers"][i] for row, exam in rows.items()},
                "scores": {str(row): each[i] for row, each in scores.items()},
            }
            for i in chosen
        ]

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Returns what must survive a crash."""
        return {
            "exams": {
                task: {
                    row: {
                        "answers": list(exam["answers"]),
                        "scores": {name: list(scores) for name, scores in exam["scores"].items()},
                        "cut_off": exam["cut_off"],
                    }
                    for row, exam in exams.items()
                }
                for task, exams in self.exams.items()
            },
            "asked": {task: dict(asked) for task, asked in self.asked.items()},
            "costs": [dict(cost) for cost in self.costs],
            "changes": [dict(change) for change in self.changes],
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restores :meth:`state`; None: of a checkpoint without metrics."""
        self.clear()
        if state is not None:
            self.exams = {
                task: {int(row): {"cut_off": 0, **exam} for row, exam in exams.items()}
                for task, exams in state["exams"].items()
            }
            self.asked = {task: dict(asked) for task, asked in state["asked"].items()}
            self.costs = [dict(cost) for cost in state["costs"]]
            self.changes = [dict(change) for change in state["changes"]]


def _scores(means: Tensor, trained: Sequence[str], preset: Preset) -> dict[str, float]:
    """The scores of one metric.

    ``sapt`` has the backward transfer of ``trace``; its forward transfer needs a reference, which no metric has.
    """
    scores = score_matrix(means, trained, "max", "trace" if preset == "sapt" else preset)
    found = {name: value for name, value in scores.items() if name in SCORES}
    return found | {"forward_transfer": math.nan} if preset == "sapt" else found
