"""All scores of a matrix, with their definitions, what they were measured on, and the tasks that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.data.measured_on import fingerprint
from lightning_cl.functional.retention import Mode, Preset, kept_shares
from lightning_cl.metrics import (
    AverageAccuracy,
    AverageOverRows,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LargestDrop,
    MeanWhenLearnt,
    ShareKept,
    WorstTask,
)


def score_matrix(
    matrix: Tensor,
    tasks: Sequence[str],
    mode: Mode,
    preset: Preset,
    reference: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The scores of the trained tasks.

    Args:
        matrix: ``[rows, tasks]``, without watched tasks; NaN where there is nothing to compare with.
        tasks: the names of its columns.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition of transfer.
        reference: the score that each task can reach, if it is known.

    Returns:
        a float for each score (NaN where nothing is known, infinite where the run diverged), ``definitions`` (a
        sentence for each score), ``worst`` (the names of the tasks that ``worst_task`` and ``largest_drop`` are about),
        and ``kept`` (for each task trained so far the share of what its training gave; NaN where there is none).
    """
    s = torch.tensor([reference[name] for name in tasks], dtype=torch.float64) if reference else None
    metrics: dict[str, Any] = {
        "average": AverageAccuracy(mode),
        "average_over_rows": AverageOverRows(mode),
        "worst_task": WorstTask(mode),
        "mean_when_learnt": MeanWhenLearnt(mode),
        "share_kept": ShareKept(mode),
        "forgetting": Forgetting(mode),
        "largest_drop": LargestDrop(mode),
        "backward_transfer": BackwardTransfer(mode, preset),
        "forward_transfer": ForwardTransfer(mode, preset, s),
    }
    if s is not None:
        metrics["intransigence"] = Intransigence(s, mode)
    scores = {name: _score(metric, matrix) for name, metric in metrics.items()}
    known = len(matrix) > 1
    kept = kept_shares(matrix, mode).tolist() if known else []
    return scores | {
        "definitions": {name: metric.definition for name, metric in metrics.items()},
        "worst": _worst(matrix, tasks, mode) if known else {"worst_task": None, "largest_drop": None},
        "kept": dict(zip(tasks, kept, strict=False)),
    }


def score_fingerprints(
    scores: Sequence[str],
    trained: Sequence[str],
    measured_on: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    reference: Mapping[str, float] | None = None,
) -> dict[str, str | None]:
    """A hash for each score of what it was measured on: two runs may be compared in it where the hashes are equal.

    Args:
        scores: their names.
        trained: the tasks trained so far, in order.
        measured_on: for each column, what it was measured on (:mod:`lightning_cl.data.measured_on`).
        settings: what else a score depends on: monitor, mode and preset.
        reference: the score that each task can reach, if it is known.

    Returns:
        16 hexadecimal digits for each; None where the samples of a column cannot be read again.
    """
    earlier, later = trained[:-1], trained[1:]
    single = settings["preset"] == "sapt"
    columns = dict.fromkeys(("forgetting", "largest_drop", "backward_transfer", "share_kept"), earlier)
    columns["forward_transfer"] = trained if single else later
    with_reference = {"intransigence"} | ({"forward_transfer"} if single else set())
    found: dict[str, str | None] = {}
    for name in scores:
        # Most scores depend on the order in which the tasks were learnt.
        of = list(columns.get(name, trained))
        of = sorted(of) if name in ("average", "worst_task") else of
        about = {**settings, "reference": {task: (reference or {}).get(task) for task in of}}
        about = about if name in with_reference else dict(settings)
        found[name] = fingerprint({task: measured_on[task] for task in of if task in measured_on}, of, about)
    return found


def _score(metric: Metric, matrix: Tensor) -> float:
    if len(matrix) < 2:
        return float("nan")
    metric.set_dtype(torch.float64)
    metric.update(matrix)
    return float(metric.compute())


def _worst(matrix: Tensor, tasks: Sequence[str], mode: Mode) -> dict[str, str | None]:
    """The tasks that the two scores of a single task are about; the first one if several are as bad."""
    sign, count = (1 if mode == "max" else -1), len(matrix) - 1
    learnt, last = sign * matrix.diagonal(offset=-1)[:count], sign * matrix[-1, :count]
    change = torch.where(learnt.isinf() | last.isinf(), -torch.inf, last - learnt)[:-1]
    change = torch.where(learnt[:-1].isnan() | last[:-1].isnan(), torch.nan, change)

    def lowest(values: Tensor) -> str | None:
        known = torch.where(values.isnan(), torch.inf, values)
        return tasks[int(known.argmin())] if bool((~values.isnan()).any()) else None

    return {"worst_task": lowest(last), "largest_drop": lowest(change)}
