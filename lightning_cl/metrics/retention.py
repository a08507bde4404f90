"""Average, backward transfer, forward transfer and forgetting as torchmetrics classes.

The mathematics and the presets are in :mod:`lightning_cl.functional.retention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.arguments import check_choice
from lightning_cl.functional.retention import (
    Mode,
    Preset,
    average_score,
    backward_transfer,
    check_preset,
    forgetting,
    forward_transfer,
    mean_when_learnt,
)


class _MatrixMetric(Metric):
    """A score of the matrix of every task after every task, row by row.

    ``update`` takes the next row (``[tasks]``, the first one before any training) or several (``[rows, tasks]``). A
    later row may have more tasks than an earlier one; the missing entries of the earlier one are unknown. NaN is what
    was never measured; a score that was measured and came out NaN or infinite is to be given as the worst one
    (:func:`~lightning_cl.functional.with_worst`).
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, mode: Mode = "max", **kwargs: Any) -> None:
        # Every rank has all rows: gathering them would double the matrix.
        super().__init__(**{"sync_on_compute": False} | kwargs)
        check_choice("mode", mode, ("max", "min"), "'max' (higher is better) or 'min' (lower is better)")
        self.mode: Mode = mode
        self.add_state("rows", default=[], dist_reduce_fx=None)

    def update(self, rows: Tensor) -> None:
        """Adds one row or several."""
        if rows.ndim not in (1, 2):
            raise ValueError(f"rows: expected the shape [tasks] or [rows, tasks], got {list(rows.shape)}")
        self.rows.extend(rows.detach().to(self.dtype).reshape(-1, rows.shape[-1]))

    def matrix(self) -> Tensor:
        """``[rows, tasks]``; unknown entries are NaN."""
        width = max(len(row) for row in self.rows)
        matrix = torch.full((len(self.rows), width), torch.nan, dtype=self.rows[0].dtype, device=self.rows[0].device)
        for i, row in enumerate(self.rows):
            matrix[i, : len(row)] = row
        return matrix


class AverageAccuracy(_MatrixMetric):
    """``mean_j R[T, j]``: the mean score over all tasks at the end.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the mean is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    definition = "mean over the tasks at the end"

    def compute(self) -> Tensor:
        """The mean."""
        return average_score(self.matrix())


class MeanWhenLearnt(_MatrixMetric):
    """``mean_j R[j, j]``: the mean score of each task right after its own training.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the mean is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    definition = "mean over the tasks, each right after its own training: what there was to keep"

    def compute(self) -> Tensor:
        """The mean."""
        return mean_when_learnt(self.matrix())


class BackwardTransfer(_MatrixMetric):
    """``Σ_{j<T} (R[T, j] − R[j, j])`` over ``T − 1`` (preset ``gem``) or ``T`` (``trace``, ``sapt``): positive is good.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, mode: Mode = "max", preset: Preset = "gem", **kwargs: Any) -> None:
        super().__init__(mode, **kwargs)
        check_preset(preset)
        self.preset: Preset = preset

    @property
    def definition(self) -> str:
        """The definition in words."""
        over = "T - 1" if self.preset == "gem" else "T"
        return f"change on earlier tasks since each was learnt (over {over}, {self.preset}); positive is good"

    def compute(self) -> Tensor:
        """The backward transfer."""
        return backward_transfer(self.matrix(), self.mode, self.preset)


class ForwardTransfer(_MatrixMetric):
    """``mean_{j≥2} (R[j−1, j] − R[0, j])`` (``gem``, ``trace``) or ``mean_j (R[j, j] − s_j)`` (``sapt``).

    Positive is good.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition.
        single_task: ``s``, ``[tasks]``: scores of models trained on one task alone, for ``sapt``.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(
        self, mode: Mode = "max", preset: Preset = "gem", single_task: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(mode, **kwargs)
        check_preset(preset)
        self.preset: Preset = preset
        self.single_task = single_task

    @property
    def definition(self) -> str:
        """The definition in words."""
        if self.preset == "sapt":
            return "gain over a model trained on the task alone (mean over T, sapt); positive is good"
        return f"what tasks 2 to T had gained before their own training (mean, {self.preset}); positive is good"

    def compute(self) -> Tensor:
        """The forward transfer."""
        return forward_transfer(self.matrix(), self.mode, self.preset, self.single_task)


class Forgetting(_MatrixMetric):
    """``mean_{j<T} (max_{1≤i<T} R[i, j] − R[T, j])``: positive is bad.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        kwargs: of ``torchmetrics.Metric``.
    """

    definition = "what earlier tasks lost since their best (mean over T - 1); positive is bad"

    def compute(self) -> Tensor:
        """The forgetting."""
        return forgetting(self.matrix(), self.mode)


def scores_of(matrix: Tensor, mode: Mode, preset: Preset) -> tuple[dict[str, Any], dict[str, str]]:
    """All scores of a matrix, by name, and their definitions.

    Args:
        matrix: ``[rows, tasks]``, of trained tasks; with less than two rows, all scores are NaN.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition of transfer.
    """
    metrics: dict[str, Any] = {
        "average": AverageAccuracy(mode),
        "mean_when_learnt": MeanWhenLearnt(mode),
        "backward_transfer": BackwardTransfer(mode, preset),
        "forgetting": Forgetting(mode),
        "forward_transfer": ForwardTransfer(mode, preset),
    }
    scores: dict[str, Any] = {}
    for name, metric in metrics.items():
        if len(matrix) < 2:
            scores[name] = float("nan")
            continue
        metric.set_dtype(torch.float64)
        metric.update(matrix)
        scores[name] = float(metric.compute())
    return scores, {name: metric.definition for name, metric in metrics.items()}
